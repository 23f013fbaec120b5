"""Certificates, keys and trust: files in, one `ssl.SSLContext` out, and a new one when the files change.

A `Keeper` holds what new connections use.  It looks at its files every few seconds, and at once when it is
told to; when they differ it makes a new context and swaps one reference.  Connections that are up keep the
context they began with.  Files that cannot be used, such as half-written ones or a certificate whose key
has not been replaced yet, leave the old context in force; the reason is logged once per state of the files.

Rules
-----
* Words and rules of the server side are those of pgbouncer's client_tls_sslmode, of the client side those of
  libpq's sslmode, sslrootcert, sslcert and sslkey (PostgreSQL documentation, "SSL Support").
* A mistake names the key of the configuration and says what to do.
* A key with a passphrase is refused: there is nobody to ask.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeVar

from asn1crypto.x509 import Certificate

from config.schema import SYSTEM, Config, Listen, Upstream
from proxy.auth.binding import end_point

log = logging.getLogger(__name__)

ALPN: Final = "postgresql"
"""The only application protocol that PostgreSQL knows; direct TLS demands it."""

WATCH_SECONDS: Final = 3.0

_VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_CERTIFICATE: Final = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)

Signature = tuple[tuple[int, int, int] | None, ...]
"""Of each file: inode, size and time of change (nanoseconds); None where it is not there."""


class CertificateError(Exception):
    """Files cannot be used; `key` is the option that names the one to look at."""

    def __init__(self, key: str, problem: str) -> None:
        self.key = key
        self.problem = problem
        super().__init__(f"{key}: {problem}")


@dataclass(frozen=True, slots=True)
class ServerSide:
    """What clients are shown: `end_point` is the channel binding of our certificate (RFC 5929)."""

    context: ssl.SSLContext
    end_point: bytes | None
    description: str


@dataclass(frozen=True, slots=True)
class ClientSide:
    """How servers are met."""

    context: ssl.SSLContext
    description: str


_M = TypeVar("_M", ServerSide, ClientSide)


class Keeper(Generic[_M]):
    """Keeps what `build` makes of `files`, and makes it anew when they change.  Not for several threads.

    Raises
    ------
    CertificateError
        The files cannot be used; only at the beginning.
    """

    def __init__(self, name: str, files: Iterable[Path], build: Callable[[], _M]) -> None:
        self._name = name
        self._files = tuple(files)
        self._build: Callable[[], _M] = build
        self._seen = self._signature()
        self.current: _M = build()

    def _signature(self) -> Signature:
        return tuple(map(_stat, self._files))

    def refresh(self, *, asked: bool = False) -> bool:
        """Look at the files and tell whether something new is in force; `asked`: by a person, so answer.

        It reads files: call it in a thread.
        """
        signature = self._signature()
        if signature == self._seen and not asked:
            return False
        try:
            new = self._build()
        except CertificateError as error:
            self._seen = signature
            log.error("%s; new connections still use %s", error, self.current.description)
            return False
        # Replaced while they were read?  Then the parts may not belong together: look again next time.
        self._seen = signature if self._signature() == signature else ()
        old, self.current = self.current, new
        if new.description == old.description:
            log.info("certificates for %s read again: %s, as before", self._name, new.description)
        else:
            log.info("new connections %s use %s (before: %s)", self._name, new.description, old.description)
        return True


def _stat(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


async def watch(keepers: list[Keeper[ServerSide] | Keeper[ClientSide]], now: asyncio.Event) -> None:
    """Look at the files every few seconds, and each time when `now` is set, until cancelled."""
    while True:
        try:
            async with asyncio.timeout(WATCH_SECONDS):
                await now.wait()
        except TimeoutError:
            pass
        asked = now.is_set()
        now.clear()
        for keeper in keepers:
            await asyncio.to_thread(keeper.refresh, asked=asked)


# -- towards clients -------------------------------------------------------------------------------


def for_clients(listen: Listen) -> Keeper[ServerSide] | None:
    """Return what clients get; None where TLS is off.

    Raises
    ------
    CertificateError
        A file cannot be used.
    """
    if listen.effective_tls_mode == "disable":
        return None
    files = [each for each in (listen.tls_cert, listen.tls_key, listen.tls_ca) if each is not None]
    return Keeper("from clients", files, lambda: _server_side(listen))


def _server_side(listen: Listen) -> ServerSide:
    assert listen.tls_cert is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[listen.tls_min_version]
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.num_tickets = 0  # sessions last: resuming them saves nothing and complicates new certificates
    context.set_alpn_protocols([ALPN])
    certificate = _load_chain(
        context, ("listen.tls_cert", listen.tls_cert), ("listen.tls_key", listen.tls_key)
    )
    if listen.checks_client_certificates:
        assert listen.tls_ca is not None
        _load_roots(context, "listen.tls_ca", listen.tls_ca)
        # Not CERT_REQUIRED: a client without one gets an error in words, as from the server.
        context.verify_mode = ssl.CERT_OPTIONAL
    description = _describe(certificate)
    if listen.checks_client_certificates and listen.tls_ca is not None:
        description += f", client certificates by {_describe(_first(listen.tls_ca.read_bytes()))}"
    return ServerSide(context, end_point(certificate), description)


# -- towards the server ----------------------------------------------------------------------------


def for_server(upstream: Upstream) -> Keeper[ClientSide] | None:
    """Return how to meet the server; None where TLS is never used.

    Raises
    ------
    CertificateError
        A file cannot be used.
    """
    if upstream.effective_sslmode == "disable":
        return None
    named = (upstream.sslcert, upstream.sslkey, upstream.sslrootcert)
    files = [each for each in named if each is not None and each != SYSTEM]
    return Keeper("to the server", files, lambda: _client_side(upstream))


def _client_side(upstream: Upstream) -> ClientSide:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # libpq's default
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols([ALPN])
    context.check_hostname = upstream.effective_sslmode == "verify-full"
    roots = upstream.sslrootcert
    said = f"sslmode {upstream.effective_sslmode}"
    if roots is None:
        context.verify_mode = ssl.CERT_NONE
    else:
        # As in libpq a root certificate is used in every mode, so that "require" is "verify-ca" then.
        context.verify_mode = ssl.CERT_REQUIRED
        if roots == SYSTEM:
            context.set_default_verify_paths()
            said += ", the system's root certificates"
        else:
            said += f", root {_describe(_load_roots(context, 'upstream.sslrootcert', roots))}"
    if upstream.sslcert is not None:
        own = _load_chain(
            context, ("upstream.sslcert", upstream.sslcert), ("upstream.sslkey", upstream.sslkey)
        )
        said += f", own {_describe(own)}"
    return ClientSide(context, said)


# -- files -----------------------------------------------------------------------------------------


def problems(config: Config) -> list[str]:
    """Return what is wrong with the files that a configuration names; it reads them."""
    found = []
    for check in (lambda: for_clients(config.listen), lambda: for_server(config.upstream)):
        try:
            check()
        except CertificateError as error:
            found.append(str(error))
    return found


def _read(key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(key, f"{path} cannot be read: {error.strerror}") from None


def _load_chain(
    context: ssl.SSLContext, certificate: tuple[str, Path], private_key: tuple[str, Path | None]
) -> bytes:
    """Load a certificate, with those that lead to its root, and its key; return the certificate (DER)."""
    cert_name, cert_path = certificate
    der = _first(_read(cert_name, cert_path))
    if der is None:
        raise CertificateError(cert_name, f"{cert_path} holds no certificate in PEM format")
    key_name, given = private_key
    key_path = given or cert_path
    if b"PRIVATE KEY-----" not in _read(key_name, key_path):
        what = f"{key_path} holds no private key in PEM format"
        raise CertificateError(key_name, what if given else f"{what}; name the file that does")
    if os.stat(key_path).st_mode & 0o007:
        log.warning("%s: others can read %s; take their right away with chmod o= ", key_name, key_path)

    def passphrase() -> str:
        why = f"{key_path} is protected by a passphrase, and there is nobody to ask: remove it"
        raise CertificateError(key_name, why)

    try:
        context.load_cert_chain(cert_path, key_path, passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            why = f"{key_path} is not the key of the certificate in {cert_path}"
            raise CertificateError(key_name, why) from None
        raise CertificateError(
            cert_name, f"{cert_path} or its key {key_path} cannot be used: {_reason(error)}"
        ) from None
    except OSError as error:
        raise CertificateError(cert_name, f"{cert_path} cannot be read: {error.strerror}") from None
    return der


def _load_roots(context: ssl.SSLContext, key: str, path: Path) -> bytes:
    """Load the certificates that others are checked by; return the first (DER)."""
    first = _first(_read(key, path))
    if first is None:
        raise CertificateError(key, f"{path} holds no certificate in PEM format")
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise CertificateError(key, f"{path} cannot be used: {_reason(error)}") from None
    return first


def _first(pem: bytes) -> bytes | None:
    """Return the first certificate of a file, DER."""
    found = _CERTIFICATE.search(pem)
    try:
        return ssl.PEM_cert_to_DER_cert(found[0].decode("ascii")) if found else None
    except ValueError:
        return None


def _describe(certificate: bytes | None) -> str:
    """Say which certificate it is, for people."""
    if certificate is None:
        return "no certificate"
    fingerprint = hashlib.sha256(certificate).hexdigest()[:16]
    try:
        parsed = Certificate.load(certificate)
        name = parsed.subject.human_friendly or "without a name"
        until = parsed["tbs_certificate"]["validity"]["not_after"].native
        return f'"{name}" (until {until:%Y-%m-%d}, SHA-256 {fingerprint}...)'
    except (ValueError, TypeError):
        return f"a certificate (SHA-256 {fingerprint}...)"


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).lower().replace("_", " ")
