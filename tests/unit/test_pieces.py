"""Snapshots in pieces: complete, shared between versions, and only what changed is new."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from learning.pieces import NewerFormatError, Pieces
from learning.records import Arm, ContextPolicy, QueryPolicy, Snapshot, TemplatePolicy, Trust

ARM = Arm("as is", (), "as-is")
QUERY = QueryPolicy(8, b"c", b"r", b"w", (1.0,), (0.9,), 1.0, 8.0, 20, 0.1, 0.5, {"rows": b"sketch" * 1000})


def policy(key: str, *, fallback: int = 0, query: QueryPolicy | None = None) -> TemplatePolicy:
    chosen = {3: ContextPolicy(0, 0.99, 12)}  # keys that are no text
    return TemplatePolicy(
        key,
        "public.items",
        Trust.QUERY,
        "r",
        0.98,
        (ARM, ARM),
        (0,),
        (),
        fallback,
        {},
        buckets=chosen,
        query=query,
    )


def snapshot(version: int, **policies: TemplatePolicy) -> Snapshot:
    return Snapshot(version, float(version), policies)


def test_a_snapshot_comes_back_whole_and_unchanged_policies_are_the_same_objects() -> None:
    writer, reader = Pieces(), Pieces()
    first = snapshot(1, a=policy("a", query=QUERY), b=policy("b"))
    body, manifest = writer.cut(first)
    read = reader.read(body)
    assert read == manifest
    assert reader.missing(read) == manifest.digests == writer.bodies.keys()
    one = reader.assemble(read, writer.bodies)
    assert one == first
    second = snapshot(2, a=policy("a", query=QUERY), b=policy("b", fallback=1))
    body, manifest = writer.cut(second)
    read = reader.read(body)
    (new,) = reader.missing(read)  # neither the sketch nor the other policy
    two = reader.assemble(read, {new: writer.bodies[new]})
    assert two == second
    assert two.templates["a"] is one.templates["a"]
    with pytest.raises(KeyError):
        Pieces().assemble(manifest, {})


def doctored(pieces: Pieces, body: bytes, **changes: Any) -> bytes:
    """Return the manifest as a newer version might write it; the policies in `pieces` are changed likewise."""
    whole = msgspec.msgpack.decode(body)
    for key, part in whole["templates"].items():
        known = msgspec.msgpack.decode(pieces.bodies[part["policy"]], strict=False)
        name = f"digest of {key}".encode()
        pieces.bodies[name] = msgspec.msgpack.encode({**known, **changes})
        part["policy"] = name
    return msgspec.msgpack.encode({**whole, "weather": "fair"})


def test_what_a_newer_version_wrote_is_carried_on_by_an_older_one() -> None:
    newer, older = Pieces(), Pieces()
    body, _ = newer.cut(snapshot(1, a=policy("a")))
    body = doctored(newer, body, season="winter")
    found = older.assemble(older.read(body), newer.bodies)
    assert found == snapshot(1, a=policy("a"))
    republished, _ = older.cut(snapshot(2, **found.templates, b=policy("b")))
    whole = msgspec.msgpack.decode(republished)
    kept = msgspec.msgpack.decode(older.bodies[whole["templates"]["a"]["policy"]], strict=False)
    assert (whole["weather"], kept["season"], whole["version"]) == ("fair", "winter", 2)


def test_a_policy_that_is_not_understood_costs_no_other_and_is_carried_on_until_there_is_an_own() -> None:
    newer, older = Pieces(), Pieces()
    body, _ = newer.cut(snapshot(1, a=policy("a")))
    body = doctored(newer, body, trust="clairvoyant")
    manifest = older.read(body)
    assert older.assemble(manifest, newer.bodies).templates == {}
    _, with_foreign = older.cut(snapshot(2, b=policy("b")))
    assert with_foreign.templates["a"] == manifest.templates["a"]
    _, with_own = older.cut(snapshot(3, a=policy("a"), b=policy("b")))
    assert with_own.templates["a"] != manifest.templates["a"]


def test_a_format_that_would_be_misunderstood_is_refused() -> None:
    pieces = Pieces()
    body, _ = pieces.cut(snapshot(1))
    whole = msgspec.msgpack.decode(body) | {"format": 2, "templates": 7}
    with pytest.raises(NewerFormatError, match="stays until this replica is updated"):
        pieces.read(msgspec.msgpack.encode(whole))
