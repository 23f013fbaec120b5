"""The document in which learned patterns travel between environments: JSON, versioned, order-free to merge.

A document holds, by template, the measured queries (`Label`) from which every pattern and policy is derived.
Policies themselves do not travel: they follow from the labels, from the server's statistics and from the
traffic, and the last two are another environment's.

::

    {"format": "ruvector-patterns", "version": 1,
     "templates": [{"template": {...}, "table": "public.items", "rows": 1000.0, "patterns": [{...}, ...]}]}

Rules
-----
- `merge` is the union of sets, bounded to the newest: commutative, associative and idempotent.  The order of
  documents, how they were split and how often one of them comes do not matter.
- Fields that this version does not know are kept, in every place, as long as the document is a document; of
  two values for one of them the greater JSON text stays, which does not depend on the order either.
- `version` grows only where an older reader would misunderstand the rest; such a document is refused.
- Imported labels are never audits: an audit is a claim about the traffic here.
- A label whose filter values are hashed says nothing outside its installation, and is not exported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec

from learning.records import Label, Template, is_hashed, template_key

FORMAT: Final = "ruvector-patterns"
VERSION: Final = 1
PATTERNS: Final = 3000
"""Measured queries kept of each template, the newest."""

Entry = dict[str, Any]
_Kind = TypeVar("_Kind", Label, Template)


class ExchangeError(ValueError):
    """Not a document that can be used; the message names the place and says what to do."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of one template.

    Attributes
    ----------
    table
        Resolved name, "public.items"; "" where the server was not asked yet.
    labels
        In any order.
    rows
        Of the table when they were measured; 0 unknown.
    """

    template: Template
    table: str
    labels: Sequence[Label]
    rows: float = 0.0


@dataclass(frozen=True, slots=True)
class Document:
    """A document: its own fields but for ``templates``, and the templates' entries by key."""

    fields: Mapping[str, Any]
    entries: Mapping[str, Entry]

    @property
    def patterns(self) -> int:
        """The number of measured queries in it."""
        return sum(len(entry["patterns"]) for entry in self.entries.values())


def label_id(label: Label) -> bytes:
    """Return 16 bytes that name a measurement: which query, and when.  So taking one in twice is harmless.

    What was found is not part of it: a newer version may know more of the same measurement.
    """
    named = (label.template, label.context, label.timestamp, label.k, label.vector)
    return hashlib.blake2b(msgspec.msgpack.encode(named), digest_size=16).digest()


def export(
    evidence: Iterable[Evidence], *, tables: Collection[str] | None = None, anonymize: bool = False
) -> Document:
    """Return the document of what is known.

    Parameters
    ----------
    tables
        Only these, by resolved name; None: all.
    anonymize
        Leave out query vectors, and every query with a filter value.
    """
    found = [_entry(each, anonymize=anonymize) for each in evidence if tables is None or each.table in tables]
    return merge([_document({"format": FORMAT, "version": VERSION}, [entry]) for entry in found])


def _entry(evidence: Evidence, *, anonymize: bool) -> Entry:
    labels = [label for label in evidence.labels if not is_hashed(label.context)]
    if anonymize:
        labels = [msgspec.structs.replace(x, vector=None) for x in labels if "\x1f" not in x.context]
    patterns = [msgspec.to_builtins(label) for label in labels]
    for pattern in patterns:
        del pattern["template"]  # it is the entry's
    return {
        "template": msgspec.to_builtins(evidence.template),
        "table": evidence.table,
        "rows": evidence.rows,
        "patterns": patterns,
    }


def encode(document: Document) -> bytes:
    """Return the document as JSON; equal documents give equal bytes."""
    whole = {**document.fields, "templates": [document.entries[key] for key in sorted(document.entries)]}
    return msgspec.json.encode(whole, order="deterministic")


def decode(data: bytes | str) -> Document:
    """Read a document.

    Raises
    ------
    ExchangeError
        It is none, or one of a version that this program does not know.
    """
    try:
        whole = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ExchangeError(f"this is no JSON: {error}") from None
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise ExchangeError(
            f'this is no document of patterns: "format" is not "{FORMAT}". Make one with '
            "ruvector-proxy patterns export, or ruvector_export_patterns(table)"
        )
    version = whole.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ExchangeError(
            f'"version" is {version!r} and this program knows up to {VERSION}: import it with the newer '
            "program that wrote it"
        )
    entries = whole.pop("templates", None)
    if not isinstance(entries, list):
        raise ExchangeError('"templates" is missing, or no list')
    return _document(whole, entries)


def _document(fields: Mapping[str, Any], entries: Sequence[Any]) -> Document:
    """Check every entry, and put them into the order that does not depend on how they came."""
    found: dict[str, Entry] = {}
    for number, entry in enumerate(entries):
        where = f"templates[{number}]"
        if not isinstance(entry, dict):
            raise ExchangeError(f"{where} is no object")
        template = _converted(entry.get("template"), Template, f"{where}.template")
        patterns = entry.get("patterns")
        if not isinstance(patterns, list):
            raise ExchangeError(f"{where}.patterns is missing, or no list")
        checked = {
            "table": _text(entry.get("table", ""), f"{where}.table"),
            "rows": _number(entry.get("rows", 0.0), f"{where}.rows"),
            "patterns": _united(patterns, template.key, where),
        }
        one = {**entry, **checked}
        found[template.key] = _joined(found[template.key], one) if template.key in found else one
    return Document(dict(fields), found)


def _united(patterns: Sequence[Any], template: str, where: str) -> list[Entry]:
    """Return each pattern once, the newest at most, in the order of time."""
    by_id: dict[bytes, tuple[float, Entry]] = {}
    for number, pattern in enumerate(patterns):
        label = _label(pattern, template, f"{where}.patterns[{number}]")
        name = label_id(label)
        known = by_id.get(name)
        by_id[name] = (label.timestamp, _most(known[1], pattern) if known else pattern)
    ordered = sorted(by_id, key=lambda name: (by_id[name][0], name))
    return [by_id[name][1] for name in ordered[-PATTERNS:]]


def _label(pattern: Any, template: str, where: str) -> Label:
    if not isinstance(pattern, dict):
        raise ExchangeError(f"{where} is no object")
    return _converted({**pattern, "template": template}, Label, where)


def merge(documents: Iterable[Document]) -> Document:
    """Return everything that some document knows, each measured query once."""
    fields: Entry = {"format": FORMAT, "version": VERSION}
    entries: dict[str, Entry] = {}
    for document in documents:
        fields = _most(fields, document.fields)
        for key, entry in document.entries.items():
            entries[key] = _joined(entries[key], entry) if key in entries else entry
    return Document(fields, entries)


def _joined(one: Entry, other: Entry) -> Entry:
    key = one["template"]["key"]
    patterns = _united([*one["patterns"], *other["patterns"]], key, "merged")
    return {**_most(one, other), "patterns": patterns, "template": _most(one["template"], other["template"])}


def _most(one: Mapping[str, Any], other: Mapping[str, Any]) -> Entry:
    """Return all fields of both; where they differ, the greater JSON text."""
    return {
        name: max((side[name] for side in (one, other) if name in side), key=_canonical)
        for name in sorted({*one, *other})
    }


def _canonical(value: Any) -> tuple[float, str]:
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0
    return number, json.dumps(value, sort_keys=True)


def evidence(document: Document) -> list[Evidence]:
    """Return what a document says, as labels of the template's key; none of them is an audit."""
    found = []
    for entry in document.entries.values():
        template = _converted(entry["template"], Template, "template")
        labels = [_label(pattern, template.key, "pattern") for pattern in entry["patterns"]]
        labels = [msgspec.structs.replace(label, uniform=False) for label in labels]
        found.append(Evidence(template, entry["table"], labels, entry["rows"]))
    return found


def moved(document: Document, *, database: str | None = None, user: str | None = None) -> Document:
    """Return the document for another database or user: a template's key depends on both."""
    entries = []
    for entry in document.entries.values():
        template = dict(entry["template"])
        template["database"] = database if database is not None else template["database"]
        template["user"] = user if user is not None else template["user"]
        template["key"] = template_key(
            template["database"], template["user"], template.get("search_path"), template["sql"]
        )
        entries.append({**entry, "template": template})
    return _document(document.fields, entries)


def _converted(value: Any, kind: type[_Kind], where: str) -> _Kind:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ExchangeError(f"{where}: {error}") from None


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ExchangeError(f"{where} is no text")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ExchangeError(f"{where} is no number")
    return float(value)
