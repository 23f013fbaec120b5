"""SCRAM-SHA-256 verifiers and keys, and stand-ins for users that do not exist.

A verifier is what PostgreSQL keeps in pg_authid.rolpassword::

    SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>          (salt and keys in base64)

Whoever has it can check a client's proof and prove to the client that he has it; he cannot log in with it
until a client has done so through him (RFC 5802, section 9).
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import re
from base64 import b64decode, b64encode
from dataclasses import dataclass, field
from typing import Final, Self

from scramp.core import ScramException, saslprep

ITERATIONS: Final = 4096
"""PostgreSQL's own default (scram_iterations)."""

MAX_ITERATIONS: Final = 10_000_000
"""More is refused: a few seconds of one core, which nobody sets by intention."""

SALT_LENGTH: Final = 16  # bytes, as in PostgreSQL
_KEY_LENGTH: Final = 32  # bytes of a SHA-256

_FORM: Final = re.compile(r"SCRAM-SHA-256\$(\d{1,8}):([^$:]+)\$([^$:]+):([^$:]+)")


def hmac_sha256(key: bytes, message: bytes) -> bytes:
    """Return the HMAC of RFC 5802."""
    return hmac.digest(key, message, "sha256")


def xor(left: bytes, right: bytes) -> bytes:
    """Return the exclusive or of two byte strings of equal length."""
    return bytes(a ^ b for a, b in zip(left, right, strict=True))


def unbase64(text: str | bytes) -> bytes:
    """Decode base64 strictly; raises ValueError."""
    try:
        return b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("is not base64") from error


@dataclass(frozen=True, slots=True)
class Keys:
    """What a client proves itself with, and recognises the server by."""

    client_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)

    @classmethod
    def derive(cls, password: bytes, salt: bytes, iterations: int) -> Self:
        """Derive the keys of a password: `iterations` rounds of HMAC, 1 to 2 ms for 4096.

        Releases the interpreter lock, so a thread keeps it out of an event loop's way.
        """
        salted = hashlib.pbkdf2_hmac("sha256", prepare(password), salt, iterations)
        return cls(hmac_sha256(salted, b"Client Key"), hmac_sha256(salted, b"Server Key"))

    def verifier(self, salt: bytes, iterations: int) -> Verifier:
        """Return the verifier of these keys; salt and iterations are those that they were derived with."""
        return Verifier(salt, iterations, hashlib.sha256(self.client_key).digest(), self.server_key)


@dataclass(frozen=True, slots=True)
class Verifier:
    """Salt, iteration count and the two keys that a server stores."""

    salt: bytes
    iterations: int
    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the verifier in PostgreSQL's notation.

        Raises
        ------
        ValueError
            It is none; the message shows no part of it.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError("is no SCRAM-SHA-256 verifier")
        try:
            salt, stored_key, server_key = map(unbase64, found.group(2, 3, 4))
        except ValueError:
            raise ValueError("is a SCRAM-SHA-256 verifier with a part that is not base64") from None
        iterations = int(found[1])
        if len(stored_key) != _KEY_LENGTH or len(server_key) != _KEY_LENGTH:
            raise ValueError(f"is a SCRAM-SHA-256 verifier whose keys do not have {_KEY_LENGTH} bytes")
        if not 1 <= iterations <= MAX_ITERATIONS:
            raise ValueError(f"is a SCRAM-SHA-256 verifier with {iterations} iterations")
        return cls(salt, iterations, stored_key, server_key)

    def encode(self) -> str:
        """Return PostgreSQL's notation, which `parse` reads."""
        salt, stored, server = (b64encode(x).decode() for x in (self.salt, self.stored_key, self.server_key))
        return f"SCRAM-SHA-256${self.iterations}:{salt}${stored}:{server}"


def prepare(password: bytes) -> bytes:
    """Normalise a password as PostgreSQL does: by SASLprep (RFC 4013) where that works, else as it is."""
    if password.isascii() and password.isalnum():
        return password
    try:
        return saslprep(password.decode()).encode() or password
    except (ScramException, UnicodeDecodeError):
        return password


@dataclass(frozen=True, slots=True)
class StandIns:
    """Verifiers for users that do not exist, and salts for those of whom only the password is known.

    A real user's salt stays the same from one attempt to the next, so a made-up one must do so too, also
    across processes and restarts: both come from the user's name and a secret that lasts.
    """

    secret: bytes = field(repr=False)

    def salt(self, user: bytes) -> bytes:
        """Return the salt of a user."""
        return hmac_sha256(self.secret, b"salt" + user)[:SALT_LENGTH]

    def verifier(self, user: bytes, iterations: int = ITERATIONS) -> Verifier:
        """Return a verifier to which nobody has the password."""
        stored_key = hmac_sha256(self.secret, b"stored key" + user)
        return Verifier(
            self.salt(user), iterations, stored_key, hmac_sha256(self.secret, b"server key" + user)
        )
