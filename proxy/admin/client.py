"""The admin HTTP server as the command line asks it: `explain`, `status` and `top`."""

from __future__ import annotations

import urllib.error
import urllib.request
from typing import Any

import msgspec

from config.schema import Admin, host_port

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104


class UnreachableError(Exception):
    """Nobody answers, or not us; the message says where, why, and what to do."""


class AdminClient:
    """Asks the proxy that a configuration describes, on the machine where it runs."""

    def __init__(self, admin: Admin, timeout: float = 20.0) -> None:
        self._headers = {"Authorization": f"Bearer {admin.token.get_secret_value()}"} if admin.token else {}
        self._timeout = timeout
        self._port = admin.port
        self.url = f"http://{host_port(_EVERYWHERE.get(admin.host, admin.host), admin.port)}"

    def request(self, path: str, body: bytes | None = None) -> bytes:
        """Return the answer to GET, or with a body to POST.

        Raises
        ------
        UnreachableError
            There is no answer.
        """
        if not self._port:
            raise UnreachableError(
                "admin.port is 0: name the port that the proxy's log shows (RUVECTOR_ADMIN_PORT)"
            )
        method = "GET" if body is None else "POST"
        request = urllib.request.Request(  # noqa: S310
            f"{self.url}{path}", body, self._headers, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:  # noqa: S310
                answer: bytes = response.read()
                return answer
        except urllib.error.HTTPError as error:
            with error:
                why = error.read(500).decode(errors="replace").strip()
            raise UnreachableError(f"{self.url}{path} answers {error.code}: {why}") from error
        except OSError as error:
            why = str(getattr(error, "reason", error))
            raise UnreachableError(
                f"no proxy answers at {self.url} ({why}): is it running, with this configuration "
                "(admin.host, admin.port)?"
            ) from error

    def json(self, path: str) -> Any:
        """Return an answer that is JSON; raises as `request`, and where it is something else."""
        try:
            return msgspec.json.decode(self.request(path))
        except msgspec.DecodeError as error:
            raise UnreachableError(f"{self.url}{path} does not answer as a ruvector-proxy does") from error
