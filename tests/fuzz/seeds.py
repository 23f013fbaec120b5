"""Makes the corpus out of real messages: scripts played against a real server, and what it answered.

One file for each kind of message, named by its content; run again after new kinds of message are known:
``python -m tests.fuzz.seeds``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import psycopg

from bench.embedded import FAST_SETTINGS, EmbeddedPostgres
from proxy.wire import framing
from tests.differential import notation
from tests.differential.world import Server, world
from tests.integration.raw import message

CORPUS = Path(__file__).parent / "corpus"
SCRIPTS = Path(__file__).parent.parent / "differential" / "scripts"
PLAYED = (
    "byte_by_byte",
    "copy_in_extended",
    "copy_out",
    "discard",
    "error_position",
    "function_call",
    "nothing_but_notices",
    "parameter_status",
    "row_limit",
    "savepoints",
    "startup_protocol_newest",
    "transaction",
)
MORE: dict[str, list[bytes]] = {
    "startup": [
        b"\x04\xd2\x16\x2f",
        b"\x04\xd2\x16\x30",
        b"\x04\xd2\x16\x2e\0\0\0\7abcd",
        b"\0\3\0\0user\0u\0database\0d\0options\0-c a=b\0\0",
        b"\0\3\0\2user\0u\0_pq_.x\0001\0\0",
    ],
    "authentication": [
        b"\0\0\0\0",
        b"\0\0\0\3",
        b"\0\0\0\5salt",
        b"\0\0\0\nSCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0",
        b"\0\0\0\x0br=abc,s=def,i=4096",
        b"\0\0\0\x0cv=abc",
        b"SCRAM-SHA-256\0\0\0\0\x08n,,n=,r=x",
        b"secret\0",
    ],
    "vectors": [
        b"[0.1,0.2,0.3]",
        b" [ 1e-3 , -2 ] ",
        notation.vector(0.1, 0.2),
        b"\0\0\0\5",
        b"10",
        b"[NaN]",
    ],
}


def main() -> None:
    found: dict[str, set[bytes]] = {name: set(items) for name, items in MORE.items()}
    settings = {**FAST_SETTINGS}
    with EmbeddedPostgres(settings=settings, listen=True) as postgres:
        with psycopg.connect(postgres.dsn("template1"), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
        with world(Server(postgres.host, postgres.port, postgres.user), "seeds") as there:
            for name in PLAYED:
                steps = notation.read((SCRIPTS / f"{name}.script").read_text())
                sent = [step.data for step in steps if step.is_message]
                seen = there.play(steps, "direct").seen.messages
                _collect(found, sent, [message(tag, body) for tag, body in seen])
    for target, items in found.items():
        directory = CORPUS / target
        directory.mkdir(parents=True, exist_ok=True)
        for item in items:
            (directory / hashlib.sha1(item, usedforsecurity=False).hexdigest()[:12]).write_bytes(item)


def _collect(found: dict[str, set[bytes]], sent: list[bytes], seen: list[bytes]) -> None:
    kinds: set[tuple[str, int, int]] = set()
    for side, messages in (("frontend", sent), ("backend", seen)):
        for item in messages:
            tag, size = item[0], len(item).bit_length()
            if (side, tag, size) in kinds or len(item) > 600:
                continue
            kinds.add((side, tag, size))
            body = item[5:]
            found.setdefault(side, set()).add(item[:1] + body)
            found.setdefault("framing", set()).add(item)
            if tag in b"dcfGHW":
                found.setdefault("copying", set()).add(body)
            if tag in b"EN" and side == "backend":
                found.setdefault("diagnostics", set()).add(body)
            if tag in (framing.QUERY, framing.PARSE) and side == "frontend":
                text = framing.query_text(body) if tag == framing.QUERY else framing.parse_header(body)[1]
                found.setdefault("glance", set()).add(text)
                found.setdefault("recogniser", set()).add(text)
    found.setdefault("session", set()).add(b"".join(_piece(False, item) for item in sent)[:2000])
    mixed = b"".join(_piece(False, item) for item in sent[:6])
    mixed += b"".join(_piece(True, item) for item in seen[-12:])
    found["session"].add(mixed[:2000])


def _piece(from_server: bool, item: bytes) -> bytes:
    """As tests.fuzz.targets reads it: at most 127 bytes each."""
    out = b""
    for i in range(0, len(item), 127):
        part = item[i : i + 127]
        out += bytes([len(part) | (0x80 if from_server else 0)]) + part
    return out


if __name__ == "__main__":
    main()
