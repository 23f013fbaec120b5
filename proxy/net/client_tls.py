"""Who has to come with TLS, and with which certificate: the words of `listen.tls_mode`.

Rules
-----
* A client on a unix socket never has TLS, and none is asked of it.
* A CancelRequest is taken without TLS, too: libpq before version 17 never encrypts it, and it says nothing
  that an eavesdropper could not have seen before.
* The certificate that a client is shown is the one that is in force when its handshake begins.
"""

from __future__ import annotations

import ssl
from typing import Any

from config.schema import Listen
from proxy.net import messages
from proxy.net.certificates import Keeper, ServerSide


class ClientTLS:
    """What `listen` demands of clients; `keeper` has the certificate, None where TLS is off."""

    def __init__(self, listen: Listen, keeper: Keeper[ServerSide] | None) -> None:
        self._keeper = keeper
        self._required = listen.requires_tls
        self._checked = listen.checks_client_certificates
        self._bound = listen.effective_tls_mode == "verify-full"

    def side(self) -> ServerSide | None:
        """Return what a client that comes now is shown; None: no TLS."""
        return self._keeper.current if self._keeper is not None else None

    def objection(self, user: bytes, tls: ssl.SSLObject | None) -> bytes | None:
        """Return the error for a client (not on a unix socket) that may not go on, or None.

        `user` is the name in its start-up packet.
        """
        if tls is None:
            return messages.tls_required() if self._required else None
        if not self._checked:
            return None
        certificate = tls.getpeercert()
        if not certificate:
            return messages.certificate_required()
        if self._bound and user.decode(errors="replace") not in _common_names(certificate):
            return messages.certificate_of_another(user)
        return None


def _common_names(certificate: ssl._PeerCertRetDictType) -> list[str]:
    """Return the common name of the subject; more than one would be ambiguous, and count for nothing."""
    subject: Any = certificate.get("subject", ())
    names = [value for part in subject for key, value in part if key == "commonName"]
    return names if len(names) == 1 else []


PLAIN = ClientTLS(Listen(), None)
"""No TLS at all."""
