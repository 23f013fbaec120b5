"""A snapshot in pieces that are named by their content, as the shared store keeps it.  Pure.

A snapshot is a *manifest* and *pieces*: one for each template's policy, and one for each large part of it
(the sample of the table's rows, which seldom changes).  A replica fetches the pieces that it does not have,
so that a new policy for one template costs that policy and not the whole snapshot.

Replicas of different versions use the same store during a rolling update.

Rules
-----
- Pieces and fields of the manifest that this version does not understand are carried on: a policy that was
  not derived anew keeps its piece, byte for byte, whoever publishes.
- A policy that cannot be decoded is left out (its queries run as they came), and no other with it.
- `FORMAT` grows only where an older version would misunderstand a policy; it then keeps the policy it has.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from learning.records import Snapshot, TemplatePolicy

log = logging.getLogger(__name__)

FORMAT: Final = 1
_pack = msgspec.msgpack.Encoder().encode


class NewerFormatError(ValueError):
    """The snapshot was written by a newer version in a way that would be misunderstood."""


class Part(msgspec.Struct, frozen=True):
    """The digests of one template's policy and of its large parts."""

    policy: bytes
    extra: dict[str, bytes] = {}

    @property
    def digests(self) -> set[bytes]:
        """All of them."""
        return {self.policy, *self.extra.values()}


class Manifest(msgspec.Struct, frozen=True):
    """Which pieces make a snapshot."""

    version: int
    created_at: float
    templates: dict[str, Part]
    format: int = FORMAT

    @property
    def digests(self) -> set[bytes]:
        """All pieces that are needed."""
        return set().union(*(part.digests for part in self.templates.values()))


def digest(body: bytes) -> bytes:
    """Return the name of a piece, 16 bytes."""
    return hashlib.blake2b(body, digest_size=16).digest()


class Pieces:
    """The pieces of the last snapshot, published or read."""

    def __init__(self) -> None:
        self.bodies: dict[bytes, bytes] = {}
        self._known: dict[str, tuple[Part, TemplatePolicy]] = {}
        self._foreign: dict[str, Part] = {}  # that do not decode
        self._rest: dict[str, Any] = {}  # fields of the manifest that are not known here

    def cut(self, snapshot: Snapshot) -> tuple[bytes, Manifest]:
        """Return the manifest of a snapshot, encoded too; its pieces are in `bodies`."""
        parts: dict[str, tuple[Part, TemplatePolicy]] = {}
        bodies: dict[bytes, bytes] = {}
        for key, policy in snapshot.templates.items():
            known = self._known.get(key)
            if known is not None and known[1] is policy:
                parts[key] = known
                bodies.update({name: self.bodies[name] for name in known[0].digests})
            else:
                part, own = _cut(policy)
                parts[key] = part, policy
                bodies.update(own)
        foreign = {key: part for key, part in self._foreign.items() if key not in parts}
        for part in foreign.values():
            bodies.update({name: self.bodies[name] for name in part.digests})
        self.bodies, self._known, self._foreign = bodies, parts, foreign
        templates = {**{key: part for key, (part, _) in parts.items()}, **foreign}
        manifest = Manifest(snapshot.version, snapshot.created_at, templates)
        return _pack({**self._rest, **msgspec.to_builtins(manifest, builtin_types=(bytes,))}), manifest

    def read(self, data: bytes) -> Manifest:
        """Decode a manifest.

        Raises
        ------
        NewerFormatError
            It must not be used by this version.
        msgspec.DecodeError
            It is damaged.
        """
        whole = msgspec.msgpack.decode(data)
        if isinstance(whole, dict) and isinstance(whole.get("format"), int) and whole["format"] > FORMAT:
            raise NewerFormatError(
                f"a newer version has published a policy of format {whole['format']}, this one knows up to "
                f"{FORMAT}; the policy in force stays until this replica is updated"
            )
        manifest = msgspec.convert(whole, Manifest)
        self._rest = {name: value for name, value in whole.items() if name not in _FIELDS}
        return manifest

    def missing(self, manifest: Manifest) -> set[bytes]:
        """Return the names of the pieces that have to be fetched."""
        return manifest.digests - self.bodies.keys()

    def assemble(self, manifest: Manifest, fetched: Mapping[bytes, bytes]) -> Snapshot:
        """Return the snapshot; policies that have not changed are the same objects as before.

        Raises
        ------
        KeyError
            A piece is missing.
        """
        everything = {**self.bodies, **fetched}
        bodies = {name: everything[name] for name in manifest.digests}
        known: dict[str, tuple[Part, TemplatePolicy]] = {}
        foreign: dict[str, Part] = {}
        for key, part in manifest.templates.items():
            before = self._known.get(key)
            if before is not None and before[0] == part:
                known[key] = before
                continue
            try:
                known[key] = part, _assembled(part, bodies)
            except msgspec.DecodeError as error:
                log.warning(
                    "a policy of another version cannot be read (%s); its queries run as they came", error
                )
                foreign[key] = part
        self.bodies, self._known, self._foreign = bodies, known, foreign
        templates = {key: policy for key, (_, policy) in known.items()}
        return Snapshot(manifest.version, manifest.created_at, templates)


_FIELDS = set(Manifest.__struct_fields__)


def _cut(policy: TemplatePolicy) -> tuple[Part, dict[bytes, bytes]]:
    extra: dict[str, bytes] = {}
    bodies: dict[bytes, bytes] = {}
    query = policy.query
    if query is not None:
        extra = {name: digest(body) for name, body in query.extra.items()}
        bodies = {extra[name]: body for name, body in query.extra.items()}
        query = msgspec.structs.replace(query, extra={})
    body = _pack(msgspec.structs.replace(policy, query=query))
    part = Part(digest(body), extra)
    return part, {**bodies, part.policy: body}


def _assembled(part: Part, bodies: Mapping[bytes, bytes]) -> TemplatePolicy:
    policy = msgspec.msgpack.decode(bodies[part.policy], type=TemplatePolicy)
    if policy.query is None:
        return policy
    extra = {name: bodies[name_of] for name, name_of in part.extra.items()}
    return msgspec.structs.replace(policy, query=msgspec.structs.replace(policy.query, extra=extra))
