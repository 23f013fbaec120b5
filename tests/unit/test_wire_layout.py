"""The codec covers the list in the protocol documentation, section "Message Formats", and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.wire import authentication, backend, copying, diagnostics, framing, frontend, startup
from proxy.wire.body import BackendMessage, FrontendMessage, Message
from proxy.wire.startup import StartupPacket

FRONTEND = {
    "Bind": "B",
    "Close": "C",
    "CopyFail": "f",
    "Describe": "D",
    "Execute": "E",
    "Flush": "H",
    "FunctionCall": "F",
    "GSSResponse": "p",
    "Parse": "P",
    "PasswordMessage": "p",
    "Query": "Q",
    "SASLInitialResponse": "p",
    "SASLResponse": "p",
    "Sync": "S",
    "Terminate": "X",
}
BACKEND = {
    "AuthenticationCleartextPassword": "R",
    "AuthenticationGSS": "R",
    "AuthenticationGSSContinue": "R",
    "AuthenticationKerberosV5": "R",
    "AuthenticationMD5Password": "R",
    "AuthenticationOk": "R",
    "AuthenticationSASL": "R",
    "AuthenticationSASLContinue": "R",
    "AuthenticationSASLFinal": "R",
    "AuthenticationSSPI": "R",
    "BackendKeyData": "K",
    "BindComplete": "2",
    "CloseComplete": "3",
    "CommandComplete": "C",
    "CopyBothResponse": "W",
    "CopyInResponse": "G",
    "CopyOutResponse": "H",
    "DataRow": "D",
    "EmptyQueryResponse": "I",
    "ErrorResponse": "E",
    "FunctionCallResponse": "V",
    "NegotiateProtocolVersion": "v",
    "NoData": "n",
    "NoticeResponse": "N",
    "NotificationResponse": "A",
    "ParameterDescription": "t",
    "ParameterStatus": "S",
    "ParseComplete": "1",
    "PortalSuspended": "s",
    "ReadyForQuery": "Z",
    "RowDescription": "T",
}
BOTH = {"CopyData": "d", "CopyDone": "c"}
UNTAGGED = {"CancelRequest": 80877102, "GSSENCRequest": 80877104, "SSLRequest": 80877103}
AUTHENTICATION_CODES = {
    "AuthenticationOk": 0,
    "AuthenticationKerberosV5": 2,
    "AuthenticationCleartextPassword": 3,
    "AuthenticationMD5Password": 5,
    "AuthenticationGSS": 7,
    "AuthenticationGSSContinue": 8,
    "AuthenticationSSPI": 9,
    "AuthenticationSASL": 10,
    "AuthenticationSASLContinue": 11,
    "AuthenticationSASLFinal": 12,
}
NOT_IN_THE_LIST = {"AuthenticationResponse"}
"""Stands for any message with tag ``p``."""

MODULES = (authentication, backend, copying, diagnostics, frontend, startup)


def classes(base: type) -> dict[str, Any]:
    """Concrete message classes below `base`, by name, wherever they are defined."""
    found: dict[str, Any] = {}
    for module in MODULES:
        for name, item in vars(module).items():
            concrete = isinstance(item, type) and (hasattr(item, "TAG") or hasattr(item, "CODE"))
            if concrete and issubclass(item, base) and "__match_args__" in vars(item) and name[0] != "_":
                found[name] = item
    return found


@pytest.mark.parametrize(
    ("base", "documented"), [(FrontendMessage, FRONTEND), (BackendMessage, BACKEND)], ids=["F", "B"]
)
def test_every_documented_message_is_there_with_its_tag(
    base: type[Message], documented: dict[str, str]
) -> None:
    found = {name: chr(kind.TAG) for name, kind in classes(base).items() if name not in NOT_IN_THE_LIST}
    assert found == documented


def test_messages_of_both_sides_belong_to_neither() -> None:
    either = {
        name: chr(kind.TAG)
        for name, kind in classes(Message).items()
        if not issubclass(kind, FrontendMessage | BackendMessage)
    }
    assert either == BOTH
    assert all(classes(Message)[name].SENDER is None for name in BOTH)


def test_every_documented_packet_without_tag_is_there_with_its_code() -> None:
    found = classes(StartupPacket)
    assert {name: kind.CODE for name, kind in found.items()} == UNTAGGED
    assert startup.StartupMessage.encode(startup.StartupMessage(startup.PROTOCOL_3_0, ()))[4:8] == b"\0\3\0\0"


def test_every_authentication_request_has_its_code() -> None:
    found = classes(authentication.AuthenticationRequest)
    assert {name: kind.CODE for name, kind in found.items()} == AUTHENTICATION_CODES


def test_every_tag_has_a_constant_and_is_dispatched() -> None:
    constants = {value for name, value in vars(framing).items() if name.isupper() and isinstance(value, int)}
    tags = {ord(tag) for tag in (*FRONTEND.values(), *BACKEND.values(), *BOTH.values())}
    assert tags <= constants
    by_server = {*backend._MESSAGES, framing.AUTHENTICATION}
    sides = ((frontend._MESSAGES, {**FRONTEND, **BOTH}), (by_server, {**BACKEND, **BOTH}))
    for dispatched, documented in sides:
        assert {chr(tag) for tag in dispatched} == set(documented.values())


def test_the_list_is_complete() -> None:
    # 52 entries for PostgreSQL 18; StartupMessage is the one that has neither tag nor code.
    assert len({*FRONTEND, *BACKEND, *BOTH, *UNTAGGED, "StartupMessage"}) == 52
