"""TLS between a transport and a protocol: to the one it is a protocol, to the other a transport.

asyncio has a TLS layer of its own.  This one is here because a proxy needs what that cannot do:

* bytes that were read before TLS began are handed in (direct TLS: the first byte tells);
* an end of stream can be passed on in one direction (close_notify and FIN), while the other goes on;
* the context is chosen per connection, so that a new certificate is one reference to swap;
* no buffer between the two: what arrives is deciphered and delivered at once, and back-pressure is that
  of the transport below, in each direction for itself.

Life::

    HANDSHAKE -> OPEN -> CLOSED
              -> CLOSED            (`on_done` gets the reason)

Rules
-----
* Nothing is written before OPEN: what an owner says earlier is dropped, as nobody could read it.
* One `data_received` becomes at most one of the protocol, and a `write` of up to 64 KB one write below.
* Cost: one copy more than the cipher needs in each direction (through OpenSSL's memory buffers), and no
  exception per call: the buffers are asked first whether something is left.  They never shrink, so long
  data passes through them in pieces.
* There is no renegotiation (refused by the context), so writing never waits for reading.
"""

from __future__ import annotations

import asyncio
import enum
import ssl
from collections.abc import Callable
from typing import Any, Final

_RECORD: Final = 16384  # bytes of plaintext in a record, at most
_PIECE: Final = 65536  # bytes that pass through OpenSSL's buffers at a time

Done = Callable[[Exception | None], None]
"""Called once, when the handshake is over: with None, or the reason for which it failed."""


class State(enum.Enum):
    """See the module's docstring."""

    HANDSHAKE = enum.auto()
    OPEN = enum.auto()
    CLOSED = enum.auto()


class TLSTransport(asyncio.Transport, asyncio.Protocol):
    """A TLS connection over `raw`; `start` begins the handshake.

    `on_done` has to give it a protocol (`set_protocol`) when it is called with None, if that was not done
    before.  When it is called with a reason the transport below is being closed.
    """

    __slots__ = (
        "_closing",
        "_ended",
        "_goodbye",
        "_incoming",
        "_keep_open",
        "_on_done",
        "_outgoing",
        "_protocol",
        "_raw",
        "_state",
        "_tls",
    )

    def __init__(
        self,
        raw: asyncio.Transport,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        on_done: Done,
    ) -> None:
        super().__init__()
        self._raw = raw
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname
        )
        self._on_done: Done | None = on_done
        self._protocol: asyncio.Protocol | None = None
        self._state = State.HANDSHAKE
        self._closing = False
        self._ended = False  # the peer's end of stream was passed on
        self._keep_open = False  # ... and the protocol still has something to say
        self._goodbye = False  # our close_notify is out

    def start(self, received: bytes = b"") -> None:
        """Take the transport over and begin; `received` is what has been read from it already."""
        self._raw.set_protocol(self)
        if received:
            self.data_received(received)
        else:
            self._shake_hands()

    # -- what was agreed ---------------------------------------------------------------------------

    @property
    def ssl_object(self) -> ssl.SSLObject:
        """Certificates, ALPN, version and cipher of the connection."""
        return self._tls

    @property
    def is_open(self) -> bool:
        """Whether the handshake has succeeded and the connection is not closed."""
        return self._state is State.OPEN

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what asyncio's own TLS transports return, ``ssl_object`` included."""
        if name == "ssl_object":
            return self._tls
        return self._raw.get_extra_info(name, default)

    # -- asyncio.Protocol, towards the transport below ---------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Decipher what has arrived, and deliver it."""
        if self._closing or self._ended:
            return
        if len(data) <= _PIECE:
            self._incoming.write(data)
            if self._state is State.OPEN or self._shake_hands():
                self._deliver(self._decipher([]))
            return
        view = memoryview(data)
        plain: list[bytes] = []
        for start in range(0, len(view), _PIECE):
            self._incoming.write(view[start : start + _PIECE])
            if self._state is State.OPEN or self._shake_hands():
                self._decipher(plain)
        self._deliver(plain)

    def _shake_hands(self) -> bool:
        """Go on with the handshake; tell whether it has succeeded."""
        if self._state is not State.HANDSHAKE:
            return False
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return False
        except (ssl.SSLError, ValueError) as error:
            self._fail(error)
            return False
        self._flush()
        self._state = State.OPEN
        self._done(None)
        return self._state is State.OPEN

    def _decipher(self, plain: list[bytes]) -> list[bytes]:
        """Append to `plain` what is in the buffer; an end of stream or an error is dealt with behind it."""
        if self._state is not State.OPEN:
            return plain
        tls, incoming = self._tls, self._incoming
        try:
            while True:
                data = tls.read(_RECORD)
                if not data:
                    raise ssl.SSLZeroReturnError
                plain.append(data)
                if not incoming.pending and not tls.pending():
                    break
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._flush()
            self._end_of_stream(plain)
        except ssl.SSLError:
            self._deliver(plain)
            plain.clear()
            self._flush()  # the alert
            self._lost()
        if self._outgoing.pending:
            self._flush()
        return plain

    def _deliver(self, plain: list[bytes]) -> None:
        if plain and self._protocol is not None:
            self._protocol.data_received(plain[0] if len(plain) == 1 else b"".join(plain))

    def _end_of_stream(self, plain: list[bytes]) -> None:
        """The peer has said that it will send no more; tell the protocol behind what came before."""
        if self._ended:
            return
        self._deliver(plain)
        plain.clear()
        self._ended = True
        self._keep_open = bool(self._protocol is not None and self._protocol.eof_received())
        if not self._keep_open:
            self.close()

    def eof_received(self) -> bool:
        """The peer sends no more: the same as close_notify, which some leave out."""
        if self._state is State.OPEN and not self._ended:
            self._end_of_stream([])
        return self._state is State.OPEN and self._keep_open

    def pause_writing(self) -> None:
        """The transport below is full."""
        if self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """The transport below has room again."""
        if self._protocol is not None:
            self._protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._state = State.CLOSED
        self._closing = True
        self._done(exc or ConnectionResetError("the connection was closed during the TLS handshake"))
        protocol, self._protocol = self._protocol, None
        if protocol is not None:
            protocol.connection_lost(exc)

    # -- asyncio.Transport, towards the protocol above ---------------------------------------------

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Deliver to `protocol` from now on."""
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the protocol that is delivered to."""
        assert self._protocol is not None
        return self._protocol

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encipher and send."""
        if self._state is not State.OPEN or self._goodbye:
            return
        size = len(data)
        if not size:
            return
        try:
            sent = self._tls.write(data)
            if sent < size:
                view = memoryview(data)
                while sent < size:
                    if self._outgoing.pending >= _PIECE:
                        self._flush()
                    sent += self._tls.write(view[sent : sent + _RECORD])
        except ssl.SSLError:
            self._lost()
            return
        self._flush()

    def can_write_eof(self) -> bool:
        """Return True: an end of stream can be sent."""
        return True

    def write_eof(self) -> None:
        """Say that nothing more will be sent; reading goes on."""
        self._say_goodbye()
        if not self._closing and self._raw.can_write_eof():
            self._raw.write_eof()

    def pause_reading(self) -> None:
        """Read nothing more until `resume_reading`."""
        self._raw.pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        self._raw.resume_reading()

    def is_reading(self) -> bool:
        """Tell whether reading is not paused."""
        return self._raw.is_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the limits of the transport below, which is where written data waits."""
        self._raw.set_write_buffer_limits(high=high, low=low)

    def get_write_buffer_size(self) -> int:
        """Return the bytes that wait to be sent."""
        return self._raw.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the limits of the transport below."""
        return self._raw.get_write_buffer_limits()

    def is_closing(self) -> bool:
        """Tell whether the connection is closed or being closed."""
        return self._closing or self._raw.is_closing()

    def close(self) -> None:
        """Say goodbye, send what waits, close."""
        if not self._closing:
            self._say_goodbye()
            self._closing = True
            self._raw.close()

    def abort(self) -> None:
        """Close at once."""
        self._closing = True
        self._raw.abort()

    # -- details -----------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Send what OpenSSL has for the peer."""
        if self._outgoing.pending and not self._raw.is_closing():
            self._raw.write(self._outgoing.read())

    def _say_goodbye(self) -> None:
        """Send close_notify, once."""
        if self._state is not State.OPEN or self._goodbye:
            return
        self._goodbye = True
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # it waits for the peer's close_notify, or the connection is broken: ours is out
        self._flush()

    def _done(self, reason: Exception | None) -> None:
        on_done, self._on_done = self._on_done, None
        if on_done is not None:
            on_done(reason)

    def _fail(self, error: Exception) -> None:
        """The handshake has failed: send the alert and close."""
        self._flush()
        self._closing = True
        self._state = State.CLOSED
        self._raw.close()
        self._done(error)

    def _lost(self) -> None:
        """The stream is broken: nothing that follows can be trusted.  The protocol gets `connection_lost`."""
        self._closing = True
        self._state = State.CLOSED
        self._raw.close()
