"""The PostgreSQL frontend/backend protocol, versions 3.0 to 3.2, as pure bytes: no sockets, no event loop.

Theory
------
Every message is a tag (one byte; start-up packets have none), a length (four bytes, itself included, the
tag not) and a body.  The header alone says where the next message begins.  So there are two layers:

framing   cuts a stream by headers and reads single facts out of a body in place: the hot path.
codec     one class per message, `encode` and `decode` side by side: everywhere else.

    framing          tags, limits, `cut`, and readers of single facts
    startup          packets without a tag: StartupMessage, SSLRequest, GSSENCRequest, CancelRequest
    authentication   requests of the server, responses of the client
    copying          the COPY sub-protocol
    diagnostics      ErrorResponse, NoticeResponse
    frontend         the other messages of clients, and `decode_frontend`
    backend          the other messages of servers, and `decode_backend`

Rules
-----
* Text is bytes.  The encoding is the session's `client_encoding`, which the codec does not know; a C string
  is given without its NUL.
* `decode` takes the body without header and raises ProtocolViolation, never anything else, on anything but a
  complete, exactly fitting body.  `encode` returns the whole message, header included, and raises
  ValueError on contents that no message can carry (a NUL in a C string, a number out of range).
* Buffers: a decoded message owns its contents, so the caller may reuse the buffer as soon as `decode` has
  returned; the memoryviews of `framing.bind_parameters` alone refer to the caller's buffer, and are good
  until it changes.
* What the server judges for itself (names, type OIDs, values of format codes, versions within a major) is
  not judged here: a proxy must not refuse what the server would accept or explain better.

Source: PostgreSQL documentation, chapter "Frontend/Backend Protocol", section "Message Formats" (version 18).
"""

from proxy.wire.errors import FramingViolation, ProtocolViolation, Sender

__all__ = ["FramingViolation", "ProtocolViolation", "Sender"]
