"""All suites, in the order in which they are run."""

from __future__ import annotations

from typing import Final

from tests.conformance import drivers, jdbc, node, orm, postgresql, psql, tools
from tests.conformance.harness import Suite

SUITES: Final[tuple[Suite, ...]] = (
    drivers.asyncpg,
    drivers.psycopg2,
    drivers.pg8000,
    postgresql.regress,
    postgresql.isolation,
    postgresql.pipeline,
    psql.psql,
    tools.dump,
    tools.replication,
    tools.pgbench,
    node.node_postgres,
    jdbc.jdbc,
    orm.sqlalchemy,
    orm.django,
)
