"""``status`` and ``top``: from what a proxy answers to what a person reads."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from config.schema import Admin
from proxy.admin.client import AdminClient, UnreachableError
from proxy.status import as_text, read_metrics, status
from proxy.top import Reading, frame, percentiles

KIND: dict[str, Any] = {
    "template": "SELECT id\n  FROM items ORDER BY embedding <-> $1 LIMIT $2",
    "trust": "query",
    "reason": "by pattern",
    "arm": "ef=40",
    "recall": 0.9412,
    "recall_low": 0.921,
    "recall_high": 0.961,
    "audited_queries": 77,
    "labels": 400,
    "latency_before_ms": 2.0,
    "latency_after_ms": None,
    "holding": None,
    "recent": [
        {"at": 1.0, "k": 10, "rows": 10, "ms": 1.5, "arm": "[ef]=40", "why": "the nearest patterns say so"}
    ],
}
TABLE = {
    "table": "public.items",
    "target_recall": 0.98,
    "hints": [{"code": "reindex", "text": "REINDEX items_hnsw"}],
    "templates": [KIND],
}
OVERVIEW: dict[str, Any] = {
    "version": "1.2",
    "reasons": [],
    "relay_only": None,
    "config_refused": "",
    "learner_away": None,
    "learner": {
        "policy_version": 7,
        "spending": {"budget": 0.02, "credit_seconds": 12.0, "pace": 0.0},
        "tables": [TABLE],
    },
}
COUNTED = """
ruvector_workers_up 2
ruvector_connections_open 5
# TYPE ruvector_statements_total counter
ruvector_statements_total {statements}
# TYPE ruvector_query_duration_seconds histogram
ruvector_query_duration_seconds_bucket{{table="public.items",adapted="yes",le="0.001"}} {first}
ruvector_query_duration_seconds_bucket{{table="public.items",adapted="yes",le="0.002"}} {both}
ruvector_query_duration_seconds_bucket{{table="public.items",adapted="yes",le="+Inf"}} {all}
ruvector_query_duration_seconds_bucket{{table="other",adapted="yes",le="+Inf"}} 999
"""


def counted(statements: int, first: int, both: int, every: int) -> Any:
    return read_metrics(COUNTED.format(statements=statements, first=first, both=both, all=every))


def shown(before: Reading, now: Reading) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(frame(before, now))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_state_for_people() -> None:
    text = as_text(status(OVERVIEW, counted(40, 0, 0, 0)))
    for words in (
        "ruvector-proxy 1.2: ready",
        "2 up, 5 clients",
        "40 statements",
        "policy 7 in force, budget 2.0%, credit 12.0 s",
        "public.items, target recall 0.98",
        "SELECT id FROM items",
        "recall 0.941 [0.921, 0.961] over 77 audited",
        "latency 2.00 ms before, - now; gets ef=40 (trust: query)",
        "hint: REINDEX items_hnsw",
    ):
        assert words in text
    assert "configuration" not in text


def test_what_is_wrong_is_said() -> None:
    kind = {**KIND, "holding": {"arm": "exact", "words": "the index was rebuilt"}, "recall": None}
    learner = {**OVERVIEW["learner"], "tables": [{**TABLE, "templates": [kind]}]}
    found = {
        **OVERVIEW,
        "reasons": ["no worker is up"],
        "config_refused": "listen.port",
        "relay_only": "SIGUSR1",
        "learner": learner,
    }
    text = as_text(status(found, counted(0, 0, 0, 0)))
    for words in (
        "NOT READY: no worker is up",
        "not in force: listen.port",
        "thrown: SIGUSR1",
        "safe setting: the index was",
    ):
        assert words in text
    away = as_text(status({**found, "learner": None, "learner_away": "there is no learner"}, {}))
    assert "learner     there is no learner" in away
    assert "no vector query has been seen yet" in away


def test_a_frame_shows_what_happened_between_two_looks() -> None:
    before = Reading(10.0, OVERVIEW, counted(100, 10, 20, 20))
    now = Reading(12.0, OVERVIEW, counted(150, 20, 38, 40))
    text = shown(before, now)
    for words in (
        "25 statements/s",
        "0.941 [0.921, 0.961]",
        "[ef]=40",
        "the nearest patterns say so",
        "REINDEX",
    ):
        assert words in text
    # 20 queries: 10 up to 1 ms, 8 up to 2 ms, 2 above.
    assert percentiles(before, now, "public.items") == pytest.approx((1.0, 2.0))
    assert percentiles(now, now, "public.items") == (None, None)
    assert percentiles(before, now, "unheard.of") == (None, None)
    assert "0 statements/s" in shown(now, now)
    assert "no learner" in shown(
        now, Reading(13.0, {**OVERVIEW, "learner": None, "learner_away": "no learner"}, {})
    )


def test_a_port_that_nobody_knows_is_an_error_in_words() -> None:
    with pytest.raises(UnreachableError, match=r"admin\.port is 0"):
        AdminClient(Admin(port=0)).request("/")
    assert AdminClient(Admin(host="::", port=1)).url == "http://[::1]:1"
