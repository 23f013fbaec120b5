"""A model of the server, small enough to trust: messages in, messages out, with transactions and local settings.

It knows the protocol's rules that matter to an intermediary: one ReadyForQuery per Sync or Query, everything up to
Sync skipped after an error, implicit transactions, transaction blocks, ``SET LOCAL`` and ``set_config(..., true)``
that end with the transaction.  Every execution is written to `log` with the ef_search then in force.
"""

from __future__ import annotations

import re
import struct

from proxy.wire import framing

DEFAULT_EF = "40"
PID = b"4711"
_SET_LOCAL = re.compile(r"SET LOCAL ([a-z_.]+)='([^']*)'")
_SET_CONFIG = re.compile(r"set_config\('hnsw.ef_search', '([^']*)'")
_DO_BLOCK = re.compile(r"DO \$ruvector\$.*?END \$ruvector\$")


def message(tag: str, body: bytes = b"") -> bytes:
    return tag.encode() + struct.pack("!I", len(body) + 4) + body


class ModelServer:
    """One backend.  `receive` takes bytes of the client's in any portions and returns the replies."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []  # (SQL text, ef_search in force)
        self._buffer = b""
        self._status = "I"
        self._skipping = False
        self._statements: dict[bytes, str] = {}
        self._portals: dict[bytes, tuple[str, list[bytes]]] = {}
        self._local: dict[str, str] = {}

    def receive(self, data: bytes) -> bytes:
        self._buffer += data
        out = b""
        position = 0
        for tag, start, end in framing.frames(self._buffer):
            out += self._message(tag, self._buffer[start + 5 : end])
            position = end
        self._buffer = self._buffer[position:]
        return out

    # -- messages ---------------------------------------------------------------------------------------------------

    def _message(self, tag: int, body: bytes) -> bytes:
        if tag == framing.SYNC:
            self._skipping = False
            return self._ready()
        if self._skipping:
            return b""
        if tag == framing.PARSE:
            return self._parse(body)
        if tag == framing.BIND:
            return self._bind(body)
        if tag == framing.DESCRIBE:
            return self._describe(body)
        if tag == framing.EXECUTE:
            portal = body[: body.index(b"\0")]
            if portal not in self._portals:
                return self._fail("34000", extended=True)
            return self._run(*self._portals[portal], extended=True)
        if tag == framing.CLOSE:
            (self._statements if body[:1] == b"S" else self._portals).pop(body[1:-1], None)
            return message("3")
        if tag == framing.QUERY:
            return self._query(body[:-1].decode())
        raise AssertionError(f"unexpected message {chr(tag)}")

    def _parse(self, body: bytes) -> bytes:
        name, sql, _ = framing.parse_header(body)
        if self._status == "E" and not _ends_transaction(sql.decode()):
            return self._fail("25P02", extended=True)
        if name and name in self._statements:
            return self._fail("42P05", extended=True)
        self._statements[name] = sql.decode()
        return message("1")

    def _bind(self, body: bytes) -> bytes:
        portal, name = framing.bind_header(body)
        # The server looks the name up first.  A pipeline that binds an unknown name in a transaction that has
        # just failed may see the other of the two errors through the proxy: a known difference.
        if self._status == "E" and not _ends_transaction(self._statements.get(name, "")):
            return self._fail("25P02", extended=True)
        if name not in self._statements:
            return self._fail("26000", extended=True)
        if portal and portal in self._portals:
            return self._fail("42P03", extended=True)
        values = [bytes(value or b"") for _, value in framing.bind_parameters(body)]
        self._portals[portal] = (self._statements[name], values)
        return message("2")

    def _describe(self, body: bytes) -> bytes:
        if body[:1] == b"S":
            sql = self._statements.get(body[1:-1])
            head = message("t", struct.pack("!H", 0))
        else:
            sql = self._portals.get(body[1:-1], (None, []))[0]
            head = b""
        if sql is None:
            return self._fail("26000", extended=True)
        return head + (message("T", struct.pack("!H", 0)) if sql.startswith("SELECT") else message("n"))

    def _query(self, text: str) -> bytes:
        out = b""
        text = _DO_BLOCK.sub(lambda found: found.group().replace(";", ","), text)
        for sql in filter(None, (part.strip() for part in text.split(";"))):
            if self._status == "E" and not _ends_transaction(sql):
                return out + self._fail("25P02", extended=False) + self._ready()
            reply = self._run(sql, [], extended=False)
            out += reply
            if reply[:1] == b"E":
                break
        return out + self._ready()

    # -- execution --------------------------------------------------------------------------------------------------

    def _run(self, sql: str, values: list[bytes], *, extended: bool) -> bytes:
        if "set_config" in sql or sql.startswith("SET LOCAL"):
            return self._set(sql, values, extended=extended)
        self.log.append((sql, self._local.get("hnsw.ef_search", DEFAULT_EF)))
        if sql == "SELECT fail":
            return self._fail("22012", extended=extended)
        if sql == "BEGIN":
            self._status = "T"
            return message("C", b"BEGIN\0")
        if _ends_transaction(sql):
            self._status = "I"
            self._end_transaction()
            return message("C", sql.encode() + b"\0")
        head = b"" if extended else message("T", struct.pack("!H", 0))
        return head + message("D", struct.pack("!H", 0)) * 3 + message("C", b"SELECT 3\0")

    def _set(self, sql: str, values: list[bytes], *, extended: bool) -> bytes:
        if found := _SET_LOCAL.match(sql):
            self._local[found.group(1)] = found.group(2)
            return message("C", b"SET\0")
        restoring = "nullif" in sql
        name, value = "hnsw.ef_search", ""
        if values:
            name = values[0].decode()
            value = "" if restoring else values[1].decode()
        elif not restoring:
            found = _SET_CONFIG.search(sql)
            assert found is not None, sql
            value = found.group(1)
        if restoring:
            value = self._local.pop("saved", "")
        else:
            self._local["saved"] = self._local.get(name, "")
        self._local.pop(name, None)
        if value:
            self._local[name] = value
        if sql.startswith("DO "):
            return message("C", b"DO\0")
        head = b"" if extended else message("T", struct.pack("!H", 0))
        columns = 0 if restoring else 1
        pid = struct.pack("!I", len(PID)) + PID
        return head + message("D", struct.pack("!H", columns) + columns * pid) + message("C", b"SELECT 1\0")

    def _fail(self, code: str, *, extended: bool) -> bytes:
        self._skipping = extended
        if self._status == "T":
            self._status = "E"
        self._local.clear()
        return message("E", b"SERROR\0VERROR\0C" + code.encode() + b"\0Mfailed\0\0")

    def _ready(self) -> bytes:
        if self._status == "I":
            self._end_transaction()
        return message("Z", self._status.encode())

    def _end_transaction(self) -> None:
        self._local.clear()
        self._portals.clear()


def _ends_transaction(sql: str) -> bool:
    return sql in ("COMMIT", "ROLLBACK")
