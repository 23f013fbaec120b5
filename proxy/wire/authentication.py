"""Authentication: the server's requests, all with tag ``R``, and the client's responses, all with tag ``p``.

Requests are told apart by a code at the start of the body.  Responses are not: which of the four one is,
only the request before it tells.  `AuthenticationResponse` is what a reader without that knowledge gets;
its `data` is the body for the `decode` of the right class.

Passwords and SASL data are kept out of `repr`, so that no log can hold them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Final, Self

from proxy.wire.body import BackendMessage, BodyReader, Buffer, FrontendMessage, int32, string, value
from proxy.wire.errors import ProtocolViolation, Sender
from proxy.wire.framing import AUTHENTICATION, PASSWORD


# -- requests ----------------------------------------------------------------------------------------------
class AuthenticationRequest(BackendMessage):
    """A message with tag ``R``; subclasses write and read what follows the code."""

    __slots__ = ()
    TAG = AUTHENTICATION
    CODE: ClassVar[int]

    def _body(self) -> bytes:
        return int32(self.CODE) + self._details()

    def _details(self) -> bytes:
        return b""

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        code = reader.int32("authentication code")
        if code != cls.CODE:
            raise reader.violation(f"code {code} instead of {cls.CODE}")
        return cls._read_details(reader)

    @classmethod
    def _read_details(cls, reader: BodyReader) -> Self:
        return cls()


@dataclass(frozen=True, slots=True)
class AuthenticationOk(AuthenticationRequest):
    """Authentication is over and was successful."""

    CODE = 0


@dataclass(frozen=True, slots=True)
class AuthenticationKerberosV5(AuthenticationRequest):
    """Kerberos V5 is required; no server sends it any more."""

    CODE = 2


@dataclass(frozen=True, slots=True)
class AuthenticationCleartextPassword(AuthenticationRequest):
    """A PasswordMessage with the password itself is required."""

    CODE = 3


@dataclass(frozen=True, slots=True)
class AuthenticationMD5Password(AuthenticationRequest):
    """A PasswordMessage with the password hashed with `salt` (4 bytes) is required."""

    CODE = 5
    salt: bytes

    def _details(self) -> bytes:
        if len(self.salt) != 4:
            raise ValueError(f"a salt of {len(self.salt)} bytes, not 4")
        return self.salt

    @classmethod
    def _read_details(cls, reader: BodyReader) -> Self:
        return cls(reader.take(4, "salt"))


@dataclass(frozen=True, slots=True)
class AuthenticationGSS(AuthenticationRequest):
    """A GSSResponse is required, with the first GSSAPI token."""

    CODE = 7


class _AuthenticationData(AuthenticationRequest):
    """A request whose details are opaque bytes up to the end."""

    __slots__ = ()
    data: bytes

    def _details(self) -> bytes:
        return self.data

    @classmethod
    def _read_details(cls, reader: BodyReader) -> Self:
        return cls(reader.rest())  # type: ignore[call-arg]  # the subclasses are dataclasses of one field


@dataclass(frozen=True, slots=True)
class AuthenticationGSSContinue(_AuthenticationData):
    """The next GSSAPI or SSPI token."""

    CODE = 8
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class AuthenticationSSPI(AuthenticationRequest):
    """A GSSResponse is required, with the first SSPI token."""

    CODE = 9


@dataclass(frozen=True, slots=True)
class AuthenticationSASL(AuthenticationRequest):
    """A SASLInitialResponse is required, with one of `mechanisms`, the server's favourite first."""

    CODE = 10
    mechanisms: tuple[bytes, ...]

    def _details(self) -> bytes:
        if not all(self.mechanisms):
            raise ValueError("a mechanism without a name would end the list")
        return b"".join(map(string, self.mechanisms)) + b"\0"

    @classmethod
    def _read_details(cls, reader: BodyReader) -> Self:
        return cls(tuple(iter(lambda: reader.string("mechanism"), b"")))


@dataclass(frozen=True, slots=True)
class AuthenticationSASLContinue(_AuthenticationData):
    """A challenge, to be answered with a SASLResponse."""

    CODE = 11
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class AuthenticationSASLFinal(_AuthenticationData):
    """The outcome, with additional data for the client to verify the server."""

    CODE = 12
    data: bytes = field(repr=False)


AnyAuthenticationRequest = (
    AuthenticationOk
    | AuthenticationKerberosV5
    | AuthenticationCleartextPassword
    | AuthenticationMD5Password
    | AuthenticationGSS
    | AuthenticationGSSContinue
    | AuthenticationSSPI
    | AuthenticationSASL
    | AuthenticationSASLContinue
    | AuthenticationSASLFinal
)

_REQUESTS: Final[dict[int, type[AnyAuthenticationRequest]]] = {
    request.CODE: request
    for request in (
        AuthenticationOk,
        AuthenticationKerberosV5,
        AuthenticationCleartextPassword,
        AuthenticationMD5Password,
        AuthenticationGSS,
        AuthenticationGSSContinue,
        AuthenticationSSPI,
        AuthenticationSASL,
        AuthenticationSASLContinue,
        AuthenticationSASLFinal,
    )
}


def decode_authentication(body: Buffer) -> AnyAuthenticationRequest:
    """Return the request with this body, told apart by its code.

    Raises
    ------
    ProtocolViolation
        The body is malformed or the code unknown (4 and 6, for crypt and SCM credentials, are long gone).
    """
    code = BodyReader(bytes(body[:4]), "Authentication", Sender.BACKEND).int32("authentication code")
    if code not in _REQUESTS:
        raise ProtocolViolation(f"unknown code {code}", message="Authentication", sender=Sender.BACKEND)
    return _REQUESTS[code].decode(body)


# -- responses ---------------------------------------------------------------------------------------------
class _OpaqueResponse(FrontendMessage):
    """A response that is opaque bytes up to the end."""

    __slots__ = ()
    TAG = PASSWORD
    data: bytes

    def _body(self) -> bytes:
        return self.data

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        return cls(reader.rest())  # type: ignore[call-arg]  # the subclasses are dataclasses of one field


@dataclass(frozen=True, slots=True)
class AuthenticationResponse(_OpaqueResponse):
    """A message with tag ``p`` before it is known which of the four below it is."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class GSSResponse(_OpaqueResponse):
    """A GSSAPI or SSPI token."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SASLResponse(_OpaqueResponse):
    """The answer to AuthenticationSASLContinue."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SASLInitialResponse(FrontendMessage):
    """The chosen mechanism, and the first data for it; None where the mechanism lets the server begin."""

    TAG = PASSWORD
    mechanism: bytes
    data: bytes | None = field(repr=False)

    def _body(self) -> bytes:
        return string(self.mechanism) + value(self.data)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        return cls(reader.string("mechanism"), reader.value("initial response"))


@dataclass(frozen=True, slots=True)
class PasswordMessage(FrontendMessage):
    """The password, hashed if that was required."""

    TAG = PASSWORD
    password: bytes = field(repr=False)

    def _body(self) -> bytes:
        return string(self.password)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        return cls(reader.string("password"))
