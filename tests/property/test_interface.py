"""Properties of the SQL interface: what is not the proxy's is untouched, and what is stays in its place."""

from __future__ import annotations

import struct

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from postgast import PgQueryError, parse

from proxy.interface.rewriting import Rewriter
from proxy.interface.settings import without_clause
from proxy.interface.signatures import FUNCTIONS
from proxy.session.adaptation import Adapter
from proxy.session.counters import Counters
from proxy.session.frontend import Session

DEFAULTS = {"adaptive_search": "on", "target_recall": "0.98", "optimize_for": "balanced"}
READY = b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I"


def message(tag: bytes, body: bytes) -> bytes:
    return tag + struct.pack("!I", len(body) + 4) + body


def session() -> Session:
    found = Session(Adapter(Counters()), {"user": "u"})
    found.from_server(READY)
    return found


# -- what is not the proxy's ------------------------------------------------------------------------------------

NAMES = st.sampled_from([*FUNCTIONS, "ruvector_version", "RUVECTOR_LEARNING_STATS", "ruvector"])
HIDDEN = st.builds(
    lambda form, name: form.format(name),
    st.sampled_from(
        [
            "'{0}(''items'')'", "E'{0}(\\'items\\')'", "$${0}('items')$$", "$a${0}($$)$a$", "-- {0}('items')\n",
            "/* {0}('items') */", "/* /* {0}() */ {0}() */", '"{0}"', "{0}", "public.{0}('items')",
            "s.{0}(1, b => 2)", "t.{0}", ":{0}", "u&'{0}()'", "x.y.{0}()", '"no such {0}"(1)',
        ]
    ),
    NAMES,
)  # fmt: skip
WORDS = st.sampled_from(
    [
        "SELECT", "FROM", "t", "WHERE", "a", "=", "$1", "1", ",", "(", ")", "AS", "x", "INSERT INTO t", "VALUES",
        "ORDER BY", "LIMIT 5", "WITH", "adaptive_search", "target_recall", "SHOW ruvector", "SET a.b = 1", ";", "é",
        "BEGIN", "COMMIT", "'", '"', "$$", "/*", "*/", "--", "CREATE VIEW v AS", "EXPLAIN", "NULL", "now()", "::",
    ]
)  # fmt: skip
TEXTS = st.lists(st.one_of(WORDS, HIDDEN), max_size=14).map(" ".join)


def calls_something(sql: str) -> bool:
    """Tell, by the tree alone, whether a text calls one of the functions."""
    try:
        tree = str(parse(sql))
    except PgQueryError:
        return False
    return any(
        f'funcname {{ string {{ sval: "{name}" }} }} args' in _joined(tree) for name in FUNCTIONS
    ) or any(
        f'func_call {{ funcname {{ string {{ sval: "{name}" }} }}' in _joined(tree) for name in FUNCTIONS
    )


def _joined(tree: str) -> str:
    return " ".join(tree.split())


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(TEXTS)
@example("SELECT 'ruvector_learning_stats(1)' -- ruvector_learning_stats('items')")
@example("SELECT public.ruvector_learning_stats('items'), \"ruvector_learning_stats\" FROM t")
@example("SELECT $$ruvector_export_patterns('x')$$; /* ruvector_clear_learning('items') */")
def test_a_text_without_a_call_reaches_the_server_byte_for_byte(sql: str) -> None:
    assume(not calls_something(sql))
    body = sql.encode()
    for data in (message(b"Q", body + b"\0"), message(b"P", b"s\0" + body + b"\0\0\0")):
        assert session().from_client(data) == data


# -- what is --------------------------------------------------------------------------------------------------

CALLS = st.sampled_from(
    [
        ("(SELECT count(*) FROM ruvector_learning_stats({0}))", 1),
        ("ruvector_last_query_id()", 1),
        ("ruvector_export_patterns({0}) -> 'version'", 1),
        ("ruvector_extract_patterns(table_name => {0}, num_clusters := $2)", 1),
        ("ruvector_import_patterns({0}, ruvector_export_patterns({0}))", 2),
        ("coalesce(ruvector_prune_patterns({0}, 1, 0.5), 0)", 1),
    ]
)
ARGUMENTS = st.sampled_from(
    ["'items'", "$1", "'é'::text", "(SELECT ')' || '(')", "NULL", "'a' || $1 /* , */"]
)
REST = st.sampled_from(["", " AS é", " -- ruvector_last_query_id()\n", " + 1"])


@given(st.lists(st.tuples(CALLS, ARGUMENTS, REST), min_size=1, max_size=4), st.sampled_from(["", " FROM t"]))
def test_what_surrounds_a_call_stays_as_it_was(
    columns: list[tuple[tuple[str, int], str, str]], source: str
) -> None:
    written = [form.format(argument) + rest for (form, _), argument, rest in columns]
    sql = "SELECT 'é' AS a, " + ", ".join(written) + source
    found = Rewriter(DEFAULTS)(sql.encode(), parse(sql).stmts)
    assert found is not None
    assert found.refusal is None
    (piece,) = found.pieces
    assert len(piece.calls) == sum(count for (_, count), _, _ in columns)
    assert [call.slot for call in piece.calls] == [str(i) for i in range(len(piece.calls))]
    parse(piece.text.decode())  # what comes out is SQL
    for call in piece.calls:
        parse(call.question)
        assert sql[call.position - 1 :].startswith(call.function.name)
    sent, last, rest = piece.text.decode(), 0, ""
    shift = 0
    for start, end, length in piece.splices:
        assert sent[last + shift : start + shift] == sql[last:start]
        rest += sql[last:start]
        shift += length - (end - start)
        last = end
    assert sent[last + shift :] == sql[last:]
    for position in range(1, len(sent) + 2):
        assert 1 <= piece.original(position) <= len(sql) + 1


@given(
    st.lists(
        st.sampled_from(["adaptive_search := true", "target_recall => 0.5", "optimize_for := 'recall'"]),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([" ", "\n", "/* x */ "]),
    st.sampled_from(["", ";", " -- end", "; SELECT 1"]),
)
def test_the_clause_is_replaced_by_blanks(options: list[str], blank: str, end: str) -> None:
    before = "SELECT 'WITH (adaptive_search := true)', é FROM t ORDER BY e <-> $1 LIMIT 5"
    clause = f"WITH{blank}({', '.join(options)})"
    found = without_clause(f"{before} {clause}{end}".encode())
    assert isinstance(found, tuple)
    assert found[0].decode() == f"{before} {' ' * len(clause)}{end}"
    assert found[1].target_recall == (0.5 if "target_recall => 0.5" in options else None)
