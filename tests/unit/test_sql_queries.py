"""Which vector queries are recognised and how they are taken apart; which are left alone, and why."""

from __future__ import annotations

import pytest

from learning.records import Slot, SlotRole, Template, Value
from proxy.sql import Argument, Recogniser, Scope, Statement, VectorQuery
from proxy.sql.statements import PLAIN

SCOPE = Scope("shop", "app", None)
SEARCH = "SELECT id FROM items ORDER BY embedding <=> '[1,2]' LIMIT 5"


def recognise(sql: str | bytes, scope: Scope = SCOPE) -> Statement:
    return Recogniser().recognise(sql.encode() if isinstance(sql, str) else sql, scope)


def query(sql: str) -> VectorQuery:
    statement = recognise(sql)
    assert statement.vector is not None, statement.reason
    return statement.vector


def template(sql: str) -> Template:
    return query(sql).template


# -- vector queries -------------------------------------------------------------------------------------------


def test_a_search_with_parameters_is_taken_apart() -> None:
    found = query(
        "SELECT id FROM items WHERE category = $2 ORDER BY embedding <=> $1::vector LIMIT $3 OFFSET $4"
    )
    assert found.template.sql == (
        "SELECT id FROM items WHERE category = $1 ORDER BY embedding <=> $2::vector LIMIT $3 OFFSET $4"
    )
    assert found.template.slots == (
        Slot(SlotRole.FILTER, "category", "="),
        Slot(SlotRole.VECTOR),
        Slot(SlotRole.LIMIT),
        Slot(SlotRole.OFFSET),
    )
    assert [argument.parameter for argument in found.arguments] == [1, 0, 2, 3]
    assert (found.template.relation, found.template.column, found.template.operator) == (
        "items",
        "embedding",
        "<=>",
    )


def test_literals_become_arguments_with_their_values() -> None:
    found = query("SELECT id FROM items WHERE name = 'O''Hara' ORDER BY embedding <-> '[1,2]' LIMIT 7")
    assert found.arguments == (
        Argument(None, Value(0, b"O'Hara")),
        Argument(None, Value(0, b"[1,2]")),
        Argument(None, Value(0, b"7")),
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "SELECT id FROM items WHERE category = 5 ORDER BY embedding <=> '[1]' LIMIT 10",
            "SELECT id FROM items WHERE category = $3 ORDER BY embedding <=> $1 LIMIT $2",
        ),
        (
            "SELECT id FROM items ORDER BY embedding <=> $1 LIMIT 10",
            "select ID\n from Items -- nearest\n order by /* cosine */ (embedding <=> $1) ASC limit 3;",
        ),
        (
            "SELECT id, embedding <=> '[1]' AS d FROM items ORDER BY embedding <=> '[1]' LIMIT 10",
            "SELECT id, embedding <=> $1 AS d FROM items ORDER BY embedding <=> $1 LIMIT $2",
        ),
        (
            "SELECT id FROM items ORDER BY embedding <=> CAST($1 AS vector) LIMIT 10",
            "SELECT id FROM items ORDER BY embedding <=> '[1]'::vector LIMIT 10",
        ),
        (
            "SELECT id FROM items ORDER BY embedding <=> $1 FETCH FIRST 4 ROWS ONLY",
            "SELECT id FROM items ORDER BY embedding <=> $1 LIMIT 4",
        ),
        (
            "SELECT id FROM items WHERE active = true ORDER BY embedding <=> $1 LIMIT 4",
            "SELECT id FROM items WHERE active = $2 ORDER BY embedding <=> $1 LIMIT 4",
        ),
    ],
)
def test_two_spellings_of_one_query_have_one_key(one: str, other: str) -> None:
    assert template(one) == template(other)


def test_the_key_depends_on_the_scope() -> None:
    scopes = [
        SCOPE,
        Scope("other", "app", None),
        Scope("shop", "other", None),
        Scope("shop", "app", ""),
        Scope("shop", "app", "x"),
    ]
    statements = [recognise(SEARCH, scope) for scope in scopes]
    keys = {statement.vector.template.key for statement in statements if statement.vector}
    assert len(keys) == len(scopes)


def test_one_recogniser_keeps_scopes_apart() -> None:
    recogniser = Recogniser()
    for text in (SEARCH, SEARCH.replace("[1,2]", "[3,4]")):
        for database in ("one", "two"):
            statement = recogniser.recognise(text.encode(), Scope(database, "app", None))
            assert statement.vector is not None
            assert statement.vector.template.database == database


@pytest.mark.parametrize("operator", ["<->", "<#>", "<=>", "<+>", "<~>", "<%>"])
def test_every_operator_is_recognised_on_either_side(operator: str) -> None:
    assert template(f"SELECT 1 FROM t ORDER BY e {operator} $1 LIMIT 1").operator == operator
    assert template(f"SELECT 1 FROM t ORDER BY $1 {operator} e LIMIT 1").column == "e"


@pytest.mark.parametrize(
    ("sql", "relation", "column"),
    [
        ('SELECT * FROM public."My Items" ORDER BY "Emb" <-> $1 LIMIT 1', 'public."My Items"', "Emb"),
        ("SELECT i.id FROM items AS i ORDER BY i.e <-> $1 LIMIT 1", "items", "e"),
        ("SELECT 1 FROM a JOIN b ON a.id = b.id ORDER BY b.e <-> $1 LIMIT 1", "b", "e"),
        ("SELECT 1 FROM s.a, b ORDER BY s.a.e <-> $1 LIMIT 1", "s.a", "e"),
        ("SELECT 1 FROM ONLY items ORDER BY e OPERATOR(public.<->) $1 LIMIT 1", "items", "e"),
        ("SELECT 1 FROM t ORDER BY (e::halfvec(3)) <=> $1::halfvec(3) LIMIT 1", "t", "e"),
        ("SELECT 1 FROM t ORDER BY e <~> B'101' LIMIT 1", "t", "e"),
        ("SELECT id, e <-> $1 AS d FROM t ORDER BY d LIMIT 1", "t", "e"),
        ("SELECT id, e <-> $1 FROM t ORDER BY 2 LIMIT 1", "t", "e"),
        ("SELECT 1 FROM t ORDER BY e <-> $1 USING < LIMIT '5'::bigint", "t", "e"),
        ("SELECT * FROM (SELECT id FROM t ORDER BY e <-> $1 LIMIT 9) x WHERE id > 3", "t", "e"),
        ("WITH x AS (SELECT id FROM t ORDER BY e <-> $1 LIMIT 9) SELECT * FROM x, y", "t", "e"),
        ("SELECT 1 FROM t, plainto_tsquery('english', $2) q ORDER BY e <-> $1 LIMIT 1", "t", "e"),
    ],
)
def test_the_relation_is_found(sql: str, relation: str, column: str) -> None:
    assert (template(sql).relation, template(sql).column) == (relation, column)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("a = 1", [("a", "=")]),
        ("1 < a", [("a", ">")]),
        ("a <> 'x' AND t.b >= 2", [("a", "<>"), ("b", ">=")]),
        ("a != 'x'", [("a", "<>")]),
        ("a IN (1, 2)", [("a", "IN"), ("a", "IN")]),
        ("a = ANY($2)", [("a", "ANY")]),
        ("a = ANY($2::int[])", [("a", "ANY")]),
        ("a = ANY(ARRAY['x', 'y'])", [("a", "IN"), ("a", "IN")]),
        ("a BETWEEN 1 AND 2", [("a", "BETWEEN"), ("a", "BETWEEN")]),
        ("a = date '2020-01-01'", [("a", "=")]),
        ("a NOT IN ('x')", [(None, None)]),
        ("(a = 'x' OR b = 'y')", [(None, None), (None, None)]),
        ("lower(a) = 'x'", [(None, "=")]),
        ("m ->> 'key' = 'x'", [(None, "="), (None, "=")]),
        ("m @> '{}'", [("m", "@>")]),
        ("e <-> $1 < 5 AND a LIKE 'x'", [(None, "<"), (None, None)]),
        ("now() > '2020-01-01'", [(None, None)]),
    ],
)
def test_conditions_that_every_row_meets_are_filters(
    condition: str, expected: list[tuple[str | None, str | None]]
) -> None:
    slots = template(f"SELECT 1 FROM t WHERE {condition} ORDER BY e <-> $1 LIMIT 1").slots
    others = [slot for slot in slots if slot.role not in (SlotRole.VECTOR, SlotRole.LIMIT)]
    assert [(slot.column, slot.operator) for slot in others] == expected
    assert all((slot.role is SlotRole.FILTER) == (slot.operator is not None) for slot in others)
    assert len(slots) == len(others) + 2


@pytest.mark.parametrize(
    ("sql", "canonical"),
    [
        (
            "SELECT m->0, 1 - (e <-> $1) FROM t ORDER BY e <-> $1 LIMIT 5",
            "SELECT m -> 0, 1 - (e <-> $1) FROM t ORDER BY e <-> $1 LIMIT $2",
        ),
        (
            "SELECT substring(a, 1, 2) FROM t ORDER BY e <-> $1, 1 LIMIT 5",
            'SELECT "substring"(a, 1, 2) FROM t ORDER BY e <-> $1, 1 LIMIT $2',
        ),
        (
            "SELECT a FROM t WHERE extract(year FROM b) = 2020 AND c IS NULL ORDER BY e <-> $1 LIMIT 5",
            "SELECT a FROM t WHERE extract ('year' FROM b) = $1 AND c IS NULL ORDER BY e <-> $2 LIMIT $3",
        ),
        (
            "SELECT 1 FROM t WHERE 1 = 1 AND n::numeric(10,2) > 1.5 ORDER BY e <-> '[1]'::vector(3) LIMIT 5",
            "SELECT 1 FROM t WHERE 1 = 1 AND n::numeric(10, 2) > $1 ORDER BY e <-> $2::vector(3) LIMIT $3",
        ),
    ],
)
def test_constants_whose_type_matters_stay(sql: str, canonical: str) -> None:
    assert template(sql).sql == canonical


def test_a_parameter_used_twice_is_one_slot() -> None:
    found = query("SELECT e <-> $1 FROM t WHERE a = $2 OR b = $2 ORDER BY e <-> $1 LIMIT $3")
    assert [argument.parameter for argument in found.arguments] == [0, 1, 2]


def test_the_probe_asks_for_distances_alone() -> None:
    found = template(
        "SELECT id, $5 AS tag, e <-> $1 AS d FROM t WHERE a = $2 ORDER BY d, id LIMIT $3 OFFSET $4"
    )
    assert found.probe_sql == (
        "SELECT e <-> $1 AS distance FROM t WHERE a = $2 ORDER BY e <-> $1, id LIMIT $3 OFFSET $4"
    )
    assert found.probe_slots == (1, 2, 3, 4)


def test_the_probe_of_a_nested_search_is_the_search_alone() -> None:
    found = template(
        "WITH q AS (SELECT id FROM t WHERE a = $2 ORDER BY e <-> $1 LIMIT 9) SELECT * FROM q, u WHERE u.b = $3"
    )
    assert found.probe_sql == "SELECT e <-> $2 AS distance FROM t WHERE a = $1 ORDER BY e <-> $2 LIMIT $3"
    assert found.probe_slots == (0, 1, 2)


def test_functions_are_listed_for_the_learner() -> None:
    found = template("SELECT now(), public.f(a) FROM t ORDER BY e <-> $1 LIMIT 5")
    assert found.functions == ("now", "public.f")


# -- left alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("SELECT 1 FROM t ORDER BY e <-> $1 LIMIT 1 FOR UPDATE", "for update"),
        ("SELECT 1 FROM t ORDER BY e <-> $1 LIMIT 1 FOR SHARE OF t", "for update"),
        (
            "WITH d AS (DELETE FROM u RETURNING 1) SELECT 1 FROM t ORDER BY e <-> $1 LIMIT 1",
            "data-modifying",
        ),
        ("SELECT 1 INTO x FROM t ORDER BY e <-> $1 LIMIT 1", "select into"),
        ("INSERT INTO x SELECT 1 FROM t ORDER BY e <-> $1 LIMIT 1", "data-modifying"),
        ("DELETE FROM t WHERE id IN (SELECT id FROM t ORDER BY e <-> $1 LIMIT 1)", "data-modifying"),
        ("DECLARE c CURSOR FOR SELECT 1 FROM t ORDER BY e <-> '[1]' LIMIT 1", "cursor"),
        ("COPY (SELECT 1 FROM t ORDER BY e <-> '[1]' LIMIT 1) TO STDOUT", "copy"),
        ("EXPLAIN ANALYZE SELECT 1 FROM t ORDER BY e <-> $1 LIMIT 1", "explain"),
        ("CREATE TABLE x AS SELECT 1 FROM t ORDER BY e <-> '[1]' LIMIT 1", "create table as"),
        ("PREPARE p AS SELECT 1 FROM t ORDER BY e <-> $1 LIMIT 1", "prepare"),
        ("CREATE VIEW v AS SELECT 1 FROM t ORDER BY e <-> '[1]' LIMIT 1", "statement"),
        ("SELECT 1 FROM t ORDER BY e <-> $1 LIMIT 1; SELECT 1 FROM t ORDER BY e <-> $1 LIMIT 1",
         "several vector queries"),
        (
            "SELECT * FROM (SELECT * FROM t ORDER BY a <~> $1 LIMIT 9) x ORDER BY e <-> $2 LIMIT 1",
            "several vector queries",
        ),
        ("SELECT 1 FROM t ORDER BY e <-> $1 DESC LIMIT 1", "descending"),
        ("SELECT 1 FROM t ORDER BY e <-> $1 USING > LIMIT 1", "descending"),
        ("SELECT 1 FROM t ORDER BY e <-> $1", "no limit"),
        ("SELECT 1 FROM t ORDER BY e <-> $1 LIMIT ALL", "no limit"),
        ("SELECT 1 FROM t ORDER BY e <-> $1 LIMIT NULL", "no limit"),
        ("SELECT 1 FROM t ORDER BY e <-> $1 FETCH FIRST 3 ROWS WITH TIES", "with ties"),
        ("SELECT 1 FROM t ORDER BY e <-> $1 LIMIT 1 + 1", "limit expression"),
        ("SELECT 1 FROM t ORDER BY e <-> $1 LIMIT 1 OFFSET $2 * 10", "offset expression"),
        ("SELECT 1 FROM t ORDER BY e <-> $1 LIMIT $2 OFFSET $2", "shared argument"),
        ("SELECT DISTINCT a FROM t ORDER BY e <-> $1 LIMIT 1", "distinct"),
        ("SELECT a FROM t GROUP BY a, e ORDER BY e <-> $1 LIMIT 1", "group by"),
        ("SELECT rank() OVER (ORDER BY e <-> $1) FROM t ORDER BY e <-> $1 LIMIT 1", "window function"),
        ("SELECT 1 FROM t ORDER BY f(e) <-> $1 LIMIT 1", "function"),
        ("SELECT 1 FROM t ORDER BY e <-> f($1) LIMIT 1", "function"),
        ("SELECT 1 FROM t ORDER BY e <-> ARRAY[1,2]::vector LIMIT 1", "argument"),
        ("SELECT 1 FROM t ORDER BY e <-> (SELECT e FROM t WHERE id = 1) LIMIT 1", "argument"),
        ("SELECT 1 FROM t ORDER BY e <-> NULL LIMIT 1", "argument"),
        ("SELECT 1 FROM t ORDER BY e <-> 5 LIMIT 1", "argument"),
        ("SELECT 1 FROM t ORDER BY location <-> point '(1,2)' LIMIT 1", "argument type"),
        ("SELECT 1 FROM t ORDER BY 1 - (e <-> $1) DESC LIMIT 1", "expression"),
        ("SELECT 1 - (e <-> $1) AS s FROM t ORDER BY s DESC LIMIT 1", "expression"),
        ("SELECT 1 FROM t ORDER BY a, e <-> $1 LIMIT 1", "not the first sort key"),
        ("SELECT e <-> $1 FROM t WHERE id = 1", "no order by"),
        ("SELECT * FROM u WHERE id IN (SELECT id FROM t ORDER BY e <-> $1 LIMIT 1)", "subquery"),
        (
            "(SELECT id FROM t ORDER BY e <-> $1 LIMIT 1) UNION SELECT 2",
            "set operation",
        ),
        ("SELECT id, e <-> $1 AS d FROM t UNION SELECT id, 0 FROM u ORDER BY d LIMIT 1", "set operation"),
        (
            "SELECT 1 FROM u, LATERAL (SELECT 1 FROM t ORDER BY e <-> $1 LIMIT 1) x",
            "lateral",
        ),
        ("SELECT 1 FROM a, b ORDER BY e <-> $1 LIMIT 1", "ambiguous column"),
        ("SELECT 1 FROM t TABLESAMPLE system (9) ORDER BY e <-> $1 LIMIT 1", "column not of a table"),
        ("SELECT 1 FROM (SELECT * FROM t) x ORDER BY x.e <-> $1 LIMIT 1", "column not of a table"),
        ("WITH x AS (SELECT * FROM t) SELECT 1 FROM x ORDER BY e <-> $1 LIMIT 1", "column not of a table"),
        (
            "WITH c AS (SELECT 1 AS a), q AS (SELECT 1 FROM t, c WHERE t.a = c.a ORDER BY t.e <-> $1 LIMIT 1)"
            " SELECT * FROM q",
            "outer reference",
        ),
        ("SELECT set_config('a.b', 'c', true) FROM t ORDER BY e <-> $1 LIMIT 1", "set_config"),
        (
            f"SELECT 1 FROM t WHERE a IN ({','.join(map(str, range(200)))}) ORDER BY e <-> $1 LIMIT 1",
            "too many arguments",
        ),
    ],
)  # fmt: skip
def test_what_is_left_alone_says_why(sql: str, reason: str) -> None:
    statement = recognise(sql)
    assert statement.vector is None
    assert statement.reason == reason


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 'a <-> b' FROM t ORDER BY 1 LIMIT 1",
        "SELECT 1 /* ORDER BY e <-> $1 LIMIT 1 */",
        "SELECT 1 -- ORDER BY e <-> $1 LIMIT 1",
        'SELECT "a<->b" FROM t',
        "SELECT $$ ORDER BY e <-> '[1]' LIMIT 1 $$",
        "INSERT INTO t VALUES ('<=>')",
        "SELECT to_tsquery('a <-> b')",
    ],
)
def test_operators_in_strings_and_comments_mean_nothing(sql: str) -> None:
    assert recognise(sql) is PLAIN


def test_a_template_says_whether_the_search_is_the_whole_statement() -> None:
    search = "SELECT id FROM items ORDER BY embedding <-> $1 LIMIT 5"
    recogniser, scope = Recogniser(), Scope("db", "user", None)
    for sql, whole in (
        (search, True),
        (f"WITH q AS ({search}) SELECT * FROM q JOIN owners USING (id)", False),
        (f"SELECT * FROM ({search}) q", False),
    ):
        query = recogniser.recognise(sql.encode(), scope).vector
        assert query is not None, sql
        assert query.template.whole is whole
