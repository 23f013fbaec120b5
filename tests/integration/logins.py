"""A client without a driver for tests of authentication, and what is compared of answers."""

from __future__ import annotations

import base64
import hashlib
import hmac
import socket
import ssl
import struct
import time
from collections.abc import Callable

from bench.embedded import EmbeddedPostgres
from tests.integration.proxied import Proxy
from tests.integration.raw import Message, message

DATABASE = "postgres"
"""Nothing is made in it."""

SCRAM_ROLE = "auth_scram"
"""Asked for scram-sha-256 by the server; its password is its name."""


class Talk:
    """A client that says what it is told, up to and behind the end of authentication."""

    def __init__(
        self,
        address: tuple[str, int],
        user: str | None,
        database: str,
        version: int = 3 << 16,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.socket = socket.create_connection(address, timeout=10)
        if tls is not None:
            self.send(struct.pack("!II", 8, 80877103))
            assert self.socket.recv(1) == b"S"
            self.socket = tls.wrap_socket(self.socket)
        parameters = {"user": user, "database": database}
        pairs = "".join(f"{name}\0{value}\0" for name, value in parameters.items() if value is not None)
        body = struct.pack("!I", version) + pairs.encode() + b"\0"
        self.send(struct.pack("!I", len(body) + 4) + body)
        self._buffer = b""

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> Message | None:
        """Return the next message; None where the peer has closed."""
        while len(self._buffer) < 5 or len(self._buffer) < 1 + struct.unpack_from("!I", self._buffer, 1)[0]:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self._buffer += data
        end = 1 + struct.unpack_from("!I", self._buffer, 1)[0]
        found, self._buffer = self._buffer[:end], self._buffer[end:]
        return chr(found[0]), found[5:]

    def all(self) -> list[Message]:
        """Return all messages up to ReadyForQuery or the end."""
        messages = []
        while (found := self.receive()) is not None:
            messages.append(found)
            if found[0] == "Z":
                break
        return messages

    def challenge(self, first: bytes = b"n,,n=,r=nonce") -> dict[str, str]:
        """Choose SCRAM-SHA-256 and return the attributes of the challenge."""
        assert self.receive() == ("R", b"\0\0\0\x0aSCRAM-SHA-256\0\0")
        self.send(initial(first))
        answer = self.receive()
        assert answer is not None
        assert (answer[0], answer[1][:4]) == ("R", b"\0\0\0\x0b")
        attributes = dict(part.split("=", 1) for part in answer[1][4:].decode().split(","))
        self.server_first = answer[1][4:]
        return attributes

    def prove(self, password: str, challenge: dict[str, str], first_bare: bytes = b"n=,r=nonce") -> None:
        """Answer a challenge as RFC 5802 says, without the proxy's own code."""
        salt = base64.b64decode(challenge["s"])
        salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, int(challenge["i"]))
        client_key = hmac.digest(salted, b"Client Key", "sha256")
        without_proof = b"c=biws,r=" + challenge["r"].encode()
        signature = hmac.digest(
            hashlib.sha256(client_key).digest(),
            b",".join((first_bare, self.server_first, without_proof)),
            "sha256",
        )
        proof = base64.b64encode(bytes(a ^ b for a, b in zip(client_key, signature, strict=True)))
        self.send(message("p", without_proof + b",p=" + proof))


def initial(data: bytes | None, mechanism: bytes = b"SCRAM-SHA-256") -> bytes:
    value = struct.pack("!i", -1) if data is None else struct.pack("!i", len(data)) + data
    return message("p", mechanism + b"\0" + value)


def fields(body: bytes) -> dict[str, str]:
    """Return an error's fields, without those that name a place in the server's source."""
    found = {part[:1].decode(): part[1:].decode() for part in body.split(b"\0") if part}
    return {key: value for key, value in found.items() if key not in "FLR"}


def error_of(messages: list[Message]) -> dict[str, str]:
    assert messages[-1][0] == "E", messages
    return fields(messages[-1][1])


def address(proxy: Proxy) -> tuple[str, int]:
    return proxy.host, proxy.port


def direct(postgres: EmbeddedPostgres) -> tuple[str, int]:
    return "127.0.0.1", postgres.port


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()
