"""The canonical texts and probes are accepted by a real server, and mean the same as the original.

The corpus holds what drivers and libraries send: SQLAlchemy and Django with pgvector-python, LangChain's PGVector,
psycopg (server-side and client-side binding), asyncpg, node-postgres, JDBC, and text written by hand.
"""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import pq

from bench.embedded import EmbeddedPostgres
from learning.records import SlotRole, Value
from proxy.sql import Recogniser, Scope, VectorQuery

pytestmark = pytest.mark.integration

SCHEMA = """
    CREATE TABLE items (
        id bigserial PRIMARY KEY, title text, content text, category int, tenant_id uuid, price numeric(10,2),
        active boolean DEFAULT true, tags text[], meta jsonb DEFAULT '{}', created timestamptz DEFAULT now(),
        embedding vector(3), half halfvec(3), sparse sparsevec(3), bits bit(3));
    CREATE TABLE categories (id int PRIMARY KEY, name text);
    CREATE SCHEMA app;
    CREATE TABLE app."Doc" (id int, "Embedding" vector(3), "tenantId" int);
    CREATE TABLE langchain_pg_collection (uuid uuid PRIMARY KEY, name varchar, cmetadata json);
    CREATE TABLE langchain_pg_embedding (
        id varchar PRIMARY KEY, collection_id uuid, embedding vector, document varchar, cmetadata jsonb);
    INSERT INTO categories SELECT i, 'name ' || i FROM generate_series(0, 4) i;
    INSERT INTO items (title, content, category, tenant_id, price, active, tags, meta, embedding, half, sparse, bits)
        SELECT 'title ' || i, 'a text about cats', i % 5, md5((i % 3)::text)::uuid, i, i % 2 = 0,
            ARRAY['x', 'y' || i % 2], jsonb_build_object('source', 's' || i % 2, 'year', 2020 + i % 3),
            v::vector, v::halfvec, v::vector::sparsevec, (i % 8)::bit(3)
        FROM generate_series(1, 60) i, LATERAL (SELECT format('[%s,%s,%s]', i, i * 7 % 11, i * 5 % 13)) AS t(v);
    INSERT INTO app."Doc" SELECT id, embedding, category FROM items;
    INSERT INTO langchain_pg_collection VALUES ('00000000-0000-0000-0000-000000000001', 'docs', '{}');
    INSERT INTO langchain_pg_embedding
        SELECT id::text, '00000000-0000-0000-0000-000000000001', embedding, content, meta FROM items;
"""

BY_HAND = [
    "SELECT id FROM items ORDER BY embedding <-> '[1,2,3]' LIMIT 5",
    "select * from items order by embedding <=> '[1,2,3]'::vector limit 5;",
    "SELECT id, embedding <#> '[1,2,3]' AS distance FROM items ORDER BY distance LIMIT 5",
    "SELECT id, (embedding <#> '[1,2,3]') * -1 AS inner_product FROM items ORDER BY embedding <#> '[1,2,3]' LIMIT 3",
    "SELECT id, 1 - (embedding <=> '[1,2,3]') AS similarity FROM items ORDER BY embedding <=> '[1,2,3]' LIMIT 4",
    "SELECT id, embedding <+> '[3,1,2]' FROM items ORDER BY 2, id LIMIT 5 OFFSET 10",
    "SELECT id FROM items WHERE category = 3 ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE category IN (1, 2) AND active ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE category = ANY('{1,2}') ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE category = ANY(ARRAY[1,2]) ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE price BETWEEN 5 AND 40.5 ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE active = true AND NULLIF(title, '') IS NOT NULL"
    " ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE NOT active OR price < 3 ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE meta->>'source' = 's1' ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE (meta->>'year')::int >= 2021 ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE meta @> '{\"source\": \"s1\"}' ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE meta @> '{\"year\": 2020}'::jsonb ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE tags && ARRAY['y0','z'] AND tags[1] = 'x' ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE 'y1' = ANY(tags) ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE created > now() - interval '7 days' ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE created::date >= date '2020-01-01' ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE extract(year FROM created) > 2000 ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE created AT TIME ZONE 'UTC' > '2020-01-01' ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE title LIKE 'title 1%' ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE title LIKE 'title!_1%' ESCAPE '!' OR id < 9 ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE lower(title) = 'title 7' ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE substring(title, 7, 1) = '1' ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE embedding <-> '[3,1,2]' < 20 ORDER BY embedding <-> '[3,1,2]' LIMIT 5",
    "SELECT id FROM items WHERE id <> 1 ORDER BY embedding <-> '[3,1,2]' FETCH FIRST 5 ROWS ONLY",
    "SELECT id FROM items ORDER BY embedding <-> '[3,1,2]' OFFSET 2 ROWS FETCH NEXT ROW ONLY",
    "SELECT i.id, c.name FROM items i JOIN categories c ON c.id = i.category WHERE c.name = 'name 1'"
    " ORDER BY i.embedding <=> '[1,2,3]' LIMIT 5",
    "SELECT id FROM items WHERE category IN (SELECT id FROM categories WHERE name <> 'name 2' LIMIT 3)"
    " ORDER BY embedding <-> '[1,2,3]' LIMIT 5",
    "SELECT id FROM items WHERE EXISTS (SELECT 1 FROM categories c WHERE c.id = category AND c.name = 'name 2')"
    " ORDER BY embedding <-> '[1,2,3]' LIMIT 5",
    "SELECT id, CASE WHEN price > 10 THEN 'high' ELSE 'low' END FROM items ORDER BY embedding <-> '[1,2,3]' LIMIT 5",
    "SELECT id, coalesce(price, 0), round(price, 1) FROM items ORDER BY embedding <-> '[1,2,3]' LIMIT 5",
    "SELECT id, meta->'year', tags[1:1], title || ' !' FROM items ORDER BY embedding <-> '[1,2,3]' LIMIT 5",
    "WITH nearest AS (SELECT id, category FROM items ORDER BY embedding <=> '[1,2,3]' LIMIT 20)"
    " SELECT n.id, c.name FROM nearest n JOIN categories c ON c.id = n.category WHERE c.name = 'name 3'",
    "WITH wanted AS (SELECT id FROM categories WHERE name > 'name 2')"
    " SELECT id FROM items WHERE category IN (SELECT id FROM wanted) ORDER BY embedding <=> '[1,2,3]' LIMIT 5",
    "SELECT * FROM (SELECT id, embedding <=> '[1,2,3]' AS d FROM items ORDER BY d LIMIT 20) t WHERE d < 0.5",
    "SELECT id FROM items ORDER BY embedding::halfvec(3) <=> '[1,2,3]'::halfvec(3) LIMIT 5",
    "SELECT id FROM items ORDER BY half <-> '[1,2,3]' LIMIT 5",
    "SELECT id FROM items ORDER BY sparse <-> '{1:1,3:2}/3' LIMIT 5",
    "SELECT id FROM items ORDER BY bits <~> B'101', id LIMIT 5",
    "SELECT id FROM items ORDER BY bits <%> '101', id LIMIT 5",
    "SELECT \"Doc\".id FROM app.\"Doc\" WHERE \"tenantId\" = 2 ORDER BY \"Embedding\" <-> '[1,2,3]' LIMIT 5",
    "SELECT id FROM items ORDER BY embedding OPERATOR(public.<->) '[1,2,3]' LIMIT '5'",
    "SELECT id FROM items ORDER BY embedding <-> '[1,2,3]' ASC NULLS LAST, id DESC LIMIT 5",
]  # fmt: skip

LIBRARIES = [
    # SQLAlchemy 2 with pgvector-python, psycopg and asyncpg dialects
    "SELECT items.id, items.title \nFROM items ORDER BY items.embedding <-> $1 \n LIMIT $2::INTEGER",
    "SELECT items.id, items.embedding <=> $1 AS distance \nFROM items \nWHERE items.category = $2::INTEGER"
    " ORDER BY distance \n LIMIT $3::INTEGER OFFSET $4::INTEGER",
    "SELECT items.id \nFROM items \nWHERE items.category IN ($1::INTEGER, $2::INTEGER)"
    " ORDER BY (items.embedding <-> $3) ASC \n LIMIT $4::INTEGER",
    # Django with pgvector.django
    'SELECT "items"."id", "items"."title", ("items"."embedding" <-> $1::vector) AS "distance" FROM "items"'
    ' WHERE "items"."category" = $2 ORDER BY 3 ASC LIMIT 5',
    'SELECT "items"."id" FROM "items" ORDER BY ("items"."embedding" <=> $1) ASC LIMIT 5 OFFSET 5',
    # LangChain PGVector
    "SELECT langchain_pg_embedding.id AS langchain_pg_embedding_id, langchain_pg_embedding.embedding <=> $1"
    " AS distance \nFROM langchain_pg_embedding JOIN langchain_pg_collection ON"
    " langchain_pg_embedding.collection_id = langchain_pg_collection.uuid \n"
    "WHERE langchain_pg_embedding.collection_id = $2::UUID AND jsonb_path_match(langchain_pg_embedding.cmetadata,"
    " CAST($3::VARCHAR AS JSONPATH), CAST($4::JSONB AS JSONB)) ORDER BY distance ASC \n LIMIT $5::INTEGER",
    # LlamaIndex
    "SELECT id, cmetadata, document, embedding, 1 - (embedding <=> $1) AS similarity FROM"
    " langchain_pg_embedding WHERE cmetadata->>'source' = $2 ORDER BY embedding <=> $1 LIMIT $3",
    # asyncpg, psycopg, node-postgres, JDBC
    "SELECT id FROM items WHERE category = $1 ORDER BY embedding <=> $2 LIMIT $3",
    "SELECT id FROM items WHERE category = ANY($1::int[]) ORDER BY embedding <=> $2::vector LIMIT $3",
    "SELECT id FROM items WHERE tenant_id = $1::uuid AND price <= $2 ORDER BY embedding <=> $3::vector LIMIT $4",
    "SELECT id, embedding <-> $1 AS d FROM items WHERE ($2::text IS NULL OR title = $2) ORDER BY d LIMIT $3",
    "select id from items where active = $1 order by embedding <-> cast($2 as vector) fetch first $3 rows only",
    "SELECT id FROM items ORDER BY embedding <-> ($1)::public.vector LIMIT ($2)::bigint OFFSET $3",
]


@pytest.fixture(scope="module")
def connection(postgres: EmbeddedPostgres) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    name = "test_sql_canonical"
    with psycopg.connect(postgres.dsn(), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} STRATEGY file_copy")
        with psycopg.connect(postgres.dsn(name), autocommit=True) as own:
            own.execute(SCHEMA)
            yield own
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def recognised(sql: str) -> VectorQuery:
    statement = Recogniser().recognise(sql.encode(), Scope("d", "u", None))
    assert statement.vector is not None, statement.reason
    return statement.vector


def prepare(connection: psycopg.Connection[tuple[object, ...]], sql: str) -> None:
    """PREPARE through the protocol, with no parameter types given."""
    result = connection.pgconn.prepare(b"", sql.encode())
    assert result.status == pq.ExecStatus.COMMAND_OK, (sql, result.error_message.decode())


def run(
    connection: psycopg.Connection[tuple[object, ...]], sql: str, values: list[bytes | None] | None = None
) -> list[tuple[bytes | None, ...]]:
    result = connection.pgconn.exec_params(sql.encode(), values)
    assert result.status == pq.ExecStatus.TUPLES_OK, (sql, result.error_message.decode())
    return [tuple(result.get_value(i, j) for j in range(result.nfields)) for i in range(result.ntuples)]


def test_the_corpus_is_large_enough() -> None:
    assert len(set(BY_HAND + LIBRARIES)) == len(BY_HAND) + len(LIBRARIES) >= 60


@pytest.mark.parametrize("sql", BY_HAND + LIBRARIES)
def test_canonical_text_and_probe_can_be_prepared(
    connection: psycopg.Connection[tuple[object, ...]], sql: str
) -> None:
    template = recognised(sql).template
    prepare(connection, template.sql)
    prepare(connection, template.probe_sql)


@pytest.mark.parametrize("sql", BY_HAND)
def test_canonical_text_with_its_arguments_gives_the_same_rows(
    connection: psycopg.Connection[tuple[object, ...]], sql: str
) -> None:
    query = recognised(sql)
    values = [argument.literal.data if argument.literal else None for argument in query.arguments]
    assert None not in values
    expected = run(connection, sql.removesuffix(";"))
    assert run(connection, query.template.sql, values) == expected
    assert expected


@pytest.mark.parametrize("sql", BY_HAND)
def test_the_probe_gives_ascending_distances_and_as_many_rows(
    connection: psycopg.Connection[tuple[object, ...]], sql: str
) -> None:
    query = recognised(sql)
    literals = [argument.literal or Value(0, None) for argument in query.arguments]
    rows = run(
        connection, query.template.probe_sql, [literals[slot].data for slot in query.template.probe_slots]
    )
    distances = [float(row[0] or b"nan") for row in rows]
    assert distances == sorted(distances)
    limit = next(
        literal.data
        for slot, literal in zip(query.template.slots, literals, strict=True)
        if slot.role is SlotRole.LIMIT
    )
    is_nested = query.template.probe_sql.count(" FROM ") < query.template.sql.count(" FROM ")
    expected = int(limit or b"0") if is_nested else len(run(connection, sql.removesuffix(";")))
    assert len(rows) == expected


@pytest.mark.parametrize("sql", [sql for sql in BY_HAND if "OFFSET 2 ROWS FETCH" not in sql])
def test_the_canonical_text_is_recognised_as_the_same_template(sql: str) -> None:
    """Except where OFFSET stands before LIMIT: slots follow the text, the canonical spelling swaps them."""
    template = recognised(sql).template
    again = recognised(template.sql).template
    assert (again.sql, again.key, again.slots) == (template.sql, template.key, template.slots)
