"""Certificates for tests, made on the spot: a trusted authority, a strange one, servers and clients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, as files."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates; `root` is the file that trusts it."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._ca = trustme.CA()
        self._directory = directory
        self._number = 0
        self.root = directory / f"{name}.crt"
        self._name = name
        self._ca.cert_pem.write_to_path(self.root)

    def issue(self, *names: str, common_name: str | None = None) -> Issued:
        """Return a new certificate for host names and addresses."""
        self._number += 1
        made = self._ca.issue_cert(*names, common_name=common_name)
        stem = self._directory / f"{self._name}-{self._number}"
        issued = Issued(stem.with_suffix(".pem"), stem.with_suffix(".key"))
        made.private_key_pem.write_to_path(issued.key)
        issued.key.chmod(0o600)
        issued.cert.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        return issued
