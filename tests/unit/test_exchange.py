"""Documents of patterns: complete, checked, tolerant of newer fields, and the same in whatever order merged."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from learning.drift import World
from learning.exchange import (
    Document,
    Evidence,
    ExchangeError,
    decode,
    encode,
    evidence,
    export,
    label_id,
    merge,
    moved,
)
from learning.patterns import known, take_in
from learning.records import ArmResult, Label, Template, template_key
from learning.registry import Registry

VECTOR = b"\x00\x00\x80?" * 8
KEY = template_key("db", "u", None, "SELECT 1")
TEMPLATE = Template(KEY, "db", "u", None, "SELECT 1", "SELECT 1", (), (), "items", "embedding", "<->")


def label(number: int = 0, *, context: str = "10", template: str = KEY) -> Label:
    results = {"exact": ArmResult(1.0, 10, 2.5), "ef=40": ArmResult(0.9, 10, 0.5)}
    return Label(template, context, 1.0 + number, VECTOR, 10, 10, results, "as is", True)


def document(*labels: Label, rows: float = 1000.0) -> Document:
    return export([Evidence(TEMPLATE, "public.items", labels, rows)])


def everything(_table: str) -> bool:
    return True


def test_what_is_exported_is_read_back_but_never_as_an_audit() -> None:
    (found,) = evidence(decode(encode(document(label(1), label(0)))))
    assert (found.template, found.table, found.rows) == (TEMPLATE, "public.items", 1000.0)
    assert found.labels == [msgspec.structs.replace(label(n), uniform=False) for n in (0, 1)]


def test_only_the_tables_asked_for_are_exported() -> None:
    other = Template("k2", "db", "u", None, "SELECT 2", "", (), (), "other", "c", "<->")
    both = [Evidence(TEMPLATE, "public.items", [label()]), Evidence(other, "public.other", [label()])]
    assert export(both, tables={"public.other"}).entries.keys() == {"k2"}
    assert export(both).entries.keys() == {KEY, "k2"}


def test_hashed_values_are_not_exported_and_anonymized_ones_have_neither_vector_nor_value() -> None:
    labels = [label(0), label(1, context="10\x1f#0123"), label(2, context="10\x1fEntenhausen")]
    assert document(*labels).patterns == 2
    hidden = export([Evidence(TEMPLATE, "public.items", labels)], anonymize=True)
    assert hidden.patterns == 1
    assert b"Entenhausen" not in encode(hidden)
    (found,) = evidence(hidden)
    assert found.labels[0].vector is None


def doctored() -> dict[str, Any]:
    """A document as a newer version might write it: fields that nobody knows here, in every place."""
    whole = json.loads(encode(document(label(0), label(1))))
    whole["signed_by"] = "somebody"
    whole["templates"][0]["planner"] = {"cost": 1}
    whole["templates"][0]["template"]["language"] = "SQL"
    whole["templates"][0]["patterns"][1]["temperature"] = 21.5
    return dict(whole)


def test_fields_of_a_newer_version_are_kept_through_reading_merging_and_writing() -> None:
    newer = decode(json.dumps(doctored()))
    merged = json.loads(encode(merge([document(label(0), label(2)), newer, document(label(1))])))
    assert merged["signed_by"] == "somebody"
    (entry,) = merged["templates"]
    assert entry["planner"] == {"cost": 1}
    assert entry["template"]["language"] == "SQL"
    assert [pattern.get("temperature") for pattern in entry["patterns"]] == [None, 21.5, None]
    (found,) = evidence(decode(json.dumps(merged)))  # and what is known can be used all the same
    assert [x.timestamp for x in found.labels] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "knows up to 1: import it with the newer"),
        ({"version": "1"}, "\"version\" is '1'"),
        ({"format": "other"}, "patterns export"),
        ({"templates": {}}, '"templates" is missing'),
        ({"templates": [3]}, r"templates\[0\] is no object"),
        ({"templates": [{"template": {}}]}, r"templates\[0\].template: .*missing required field"),
        ({"templates": [{"template": msgspec.to_builtins(TEMPLATE)}]}, r"templates\[0\].patterns is missing"),
        (
            {"templates": [{"template": msgspec.to_builtins(TEMPLATE), "patterns": [{"k": "ten"}]}]},
            r"templates\[0\].patterns\[0\]",
        ),
    ],
)
def test_what_is_no_document_is_refused_with_its_place(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ExchangeError, match=words):
        decode(json.dumps({**json.loads(encode(document(label()))), **change}))
    with pytest.raises(ExchangeError, match="no JSON"):
        decode(b"\xff{")


def test_a_document_moves_to_another_database_and_user() -> None:
    (found,) = evidence(moved(document(label()), database="prod", user="app"))
    assert found.template.key == template_key("prod", "app", None, "SELECT 1")
    assert (found.template.database, found.template.user) == ("prod", "app")
    assert found.labels[0].template == found.template.key


def test_a_learner_takes_a_document_in_once() -> None:
    registry = Registry()
    first = take_in(registry, document(label(1), label(0)), everything, 0.0)
    again = take_in(registry, document(label(0), label(1)), everything, 0.0)
    assert (len(first.labels), len(again.labels)) == (2, 0)
    state = registry.get(KEY)
    assert state is not None
    assert [x.timestamp for x in state.labels] == [1.0, 2.0]
    assert state.label_counts == {"10": 2}
    assert {label_id(x) for x in evidence(known(registry))[0].labels} == {label_id(label(n)) for n in (0, 1)}


def test_nothing_is_taken_in_about_a_table_that_is_off_or_of_another_size() -> None:
    registry = Registry()
    off = take_in(registry, document(label()), lambda table: table != "public.items", 0.0)
    assert off.left_out == ["SELECT 1: learning about public.items is switched off"]
    assert len(registry) == 0
    state = registry.add(TEMPLATE, 0.0)
    assert state is not None
    state.watch.world = World((), 5000.0)
    sized = take_in(registry, document(label(), rows=1000.0), everything, 0.0)
    assert sized.left_out == ["SELECT 1: measured on 1,000 rows, the table here has 5,000"]
    assert not state.labels
