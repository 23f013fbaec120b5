"""One client's protocol state machine, sans-I/O: bytes in, bytes out.

startup     the packets before a session
frontend    the client's side, and the session as a whole
backend     the server's side
replies     which reply belongs to whom
injection   the bytes that set and restore settings
adaptation  from a recognised query to the settings that it gets
counters    what is counted
"""
