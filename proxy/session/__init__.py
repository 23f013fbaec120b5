"""One client's protocol state machine, sans-I/O: bytes in, bytes out.

frontend     the client's side, and the session as a whole
enforcement  settings put in force for one query, and taken back
backend      the server's side
diagnosis    errors and notices: whom they are about
replies      which reply belongs to whom
journal      what was noted when it was sent, and may have to be taken back
injection    the bytes that set and restore settings
will         what the client has set itself
adaptation   from a recognised query to the settings that it gets
counters     what is counted
"""
