"""The channel binding ``tls-server-end-point``: a hash of the certificate that the server of a leg shows.

RFC 5929, section 4: the hash function is that of the certificate's signature, SHA-256 in place of MD5 and
SHA-1.  A signature without one (Ed25519, Ed448) defines no binding; then there is none to offer.
"""

from __future__ import annotations

import hashlib

from asn1crypto.x509 import Certificate

NAME = b"tls-server-end-point"
"""The only binding that PostgreSQL knows."""

_OUTDATED = ("md5", "sha1")
_DEFINED = ("sha224", "sha256", "sha384", "sha512", "sha3_224", "sha3_256", "sha3_384", "sha3_512")


def end_point(certificate: bytes) -> bytes | None:
    """Return the binding of a certificate (DER); None where none is defined for it."""
    try:
        signature = Certificate.load(certificate)["signature_algorithm"]
        if str(signature.signature_algo) in ("ed25519", "ed448"):
            return None
        name = str(signature.hash_algo)
    except ValueError:
        return None
    if name in _OUTDATED:
        name = "sha256"
    return hashlib.new(name, certificate).digest() if name in _DEFINED else None
