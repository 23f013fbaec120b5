"""A rating taken to the server: which of the relevant rows did the index miss?

The rows are named by the table's primary key, as text.  In one snapshot of the database the served settings
and the exact search are run once more for the rated query, and the distances of the named rows are fetched by
their keys.  A relevant row whose distance is among the true ones and not among those served was missed; rows
at equal distance cannot be told apart, and then the row counts as returned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from learning.binding import BindingError, vector_text
from learning.channel import Rated
from learning.inventory import Confirmed
from learning.probe import EXACT, apply, number, snapshot, statement
from learning.records import Template, Trajectory
from learning.upstream import Session
from learning.verdict import Feedback

_SAME = 1e-6  # relative: the distance of the key's row is computed by another plan


async def judge_rating(
    session: Session, template: Template, confirmed: Confirmed, trajectory: Trajectory, rated: Rated
) -> Feedback:
    """Return what a rating says about the search.

    Raises
    ------
    BindingError
        The query's values cannot be bound, or the table has no primary key of one column.
    asyncpg.PostgresError
        The server refused or cancelled a statement.
    """
    missed = 0
    if rated.relevant:
        async with snapshot(session, confirmed.settings):
            named = await _distances(session, template, confirmed, trajectory, rated.relevant)
            arguments = await session.binder.bind(template, confirmed.types, trajectory)
            prepared = await statement(session, template, confirmed.types, custom=True)
            await apply(session, EXACT)
            truth = [number(row[0]) for row in await prepared.fetch(*arguments) if row[0] is not None]
        async with snapshot(session, confirmed.settings):
            await apply(session, trajectory.settings)
            prepared = await statement(session, template, confirmed.types, custom=True)
            served = [number(row[0]) for row in await prepared.fetch(*arguments) if row[0] is not None]
        missed = sum(_among(distance, truth) and not _among(distance, served) for distance in named)
    return Feedback(len(rated.relevant), len(rated.irrelevant), missed)


def _among(distance: float, others: Sequence[float]) -> bool:
    return any(math.isclose(distance, other, rel_tol=_SAME, abs_tol=_SAME) for other in others)


async def _distances(
    session: Session,
    template: Template,
    confirmed: Confirmed,
    trajectory: Trajectory,
    keys: Sequence[str],
) -> list[float]:
    found = await session.catalog(_KEY, str(confirmed.relation), template.column)
    if not found:
        raise BindingError("the table has no primary key of one column, so rated rows cannot be found")
    key = found[0]
    # Names come quoted from the catalogs, the operator from the parser's own list.
    query = (
        f"SELECT t.{key['column']} {template.operator} $2::pg_catalog.text::{key['type']} AS distance "  # noqa: S608
        f"FROM {key['table']} t "
        f"WHERE t.{key['key']}::pg_catalog.text OPERATOR(pg_catalog.=) ANY ($1::pg_catalog.text[])"
    )
    rows = await session.rows(query, list(keys), vector_text(trajectory.vector))
    return [number(row["distance"]) for row in rows if row["distance"] is not None]


_KEY = """
SELECT quote_ident(k.attname) AS key, quote_ident(v.attname) AS "column",
       format_type(v.atttypid, v.atttypmod) AS type,
       quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS "table"
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_index i ON i.indrelid = c.oid AND i.indisprimary AND i.indnkeyatts = 1
JOIN pg_attribute k ON k.attrelid = c.oid AND k.attnum = i.indkey[0]
JOIN pg_attribute v ON v.attrelid = c.oid AND v.attname = $2::text
WHERE c.oid = $1::text::oid
"""
