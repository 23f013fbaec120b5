"""The schema of the shared store in PostgreSQL, and whether a program may use the one that is there.

`settings.number` is the version of the schema, `settings.readable_by` the oldest version of the program's
schema that may use it.  New columns have defaults and no old one changes its meaning, so that programs of two
versions can use it during a rolling update; a step that cannot keep to this raises `readable_by`.

All tables are keyed by the group of replicas first: several groups may share a schema.
"""

from __future__ import annotations

from typing import Final

VERSION: Final = 1

_DDL = """\
CREATE SCHEMA IF NOT EXISTS {schema};
CREATE TABLE IF NOT EXISTS {schema}.settings (
    number integer NOT NULL, readable_by integer NOT NULL);
CREATE TABLE IF NOT EXISTS {schema}.groups (
    name text PRIMARY KEY, salt bytea NOT NULL,
    holder uuid, term bigint NOT NULL DEFAULT 0, expires timestamptz,
    sample double precision NOT NULL DEFAULT 1,
    version bigint NOT NULL DEFAULT 0, published_term bigint NOT NULL DEFAULT 0) WITH (fillfactor = 50);
CREATE TABLE IF NOT EXISTS {schema}.manifests (
    grp text PRIMARY KEY, body bytea NOT NULL);
CREATE TABLE IF NOT EXISTS {schema}.pieces (
    grp text, digest bytea, body bytea NOT NULL, PRIMARY KEY (grp, digest));
CREATE TABLE IF NOT EXISTS {schema}.templates (
    grp text, key text, seen timestamptz NOT NULL DEFAULT now(), off text, relation text NOT NULL DEFAULT '',
    body bytea NOT NULL, PRIMARY KEY (grp, key));
CREATE TABLE IF NOT EXISTS {schema}.labels (
    grp text, uid bytea, template text NOT NULL, at double precision NOT NULL, body bytea NOT NULL,
    PRIMARY KEY (grp, uid));
CREATE INDEX IF NOT EXISTS labels_at ON {schema}.labels (grp, template, at);
CREATE TABLE IF NOT EXISTS {schema}.notes (
    grp text, name text, body bytea NOT NULL, PRIMARY KEY (grp, name));
CREATE TABLE IF NOT EXISTS {schema}.mail (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, grp text NOT NULL,
    sent timestamptz NOT NULL DEFAULT now(), body bytea NOT NULL);
CREATE INDEX IF NOT EXISTS mail_group ON {schema}.mail (grp, id);
INSERT INTO {schema}.settings SELECT {version}, 1
    WHERE NOT EXISTS (SELECT FROM {schema}.settings);
"""

_GRANTS = """\
GRANT USAGE ON SCHEMA {schema} TO {role};
GRANT SELECT ON {schema}.settings TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON {schema}.groups, {schema}.manifests, {schema}.pieces,
    {schema}.templates, {schema}.labels, {schema}.notes, {schema}.mail TO {role};
"""


class SchemaError(Exception):
    """The store cannot be used as it is; the message says what to do."""


def ddl(schema: str) -> str:
    """Return the statements that create the store; running them again changes nothing."""
    return _DDL.format(schema=schema, version=VERSION)


def instructions(schema: str, role: str, why: str) -> str:
    """Say what somebody with the right to do so has to run."""
    quoted = '"' + role.replace('"', '""') + '"'
    return (
        f"the shared store is not there and cannot be created by this role ({why}). Run this as a role that "
        f"may, in the database of store.dsn:\n\n{ddl(schema)}{_GRANTS.format(schema=schema, role=quoted)}"
    )


def check(number: int, readable_by: int, schema: str) -> None:
    """Raise SchemaError where the schema is too new for this program."""
    if readable_by > VERSION:
        raise SchemaError(
            f"the schema {schema} has version {number}, which a program that knows version {VERSION} must "
            "not use: update this replica, or give it another store.db_schema"
        )
