"""Write the reference of all options and the sample file from the schema: ``python -m config.docs``.

Both are kept in the repository for readers; a test fails when they differ from what this module would write.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config.loader import sections, variable
from config.schema import Config, Table
from config.section import Section

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "configuration.md"
SAMPLE = ROOT / "config" / "proxy.example.toml"

EXAMPLES = {
    "listen.tls_mode": "verify-ca",
    "listen.tls_cert": "server.crt",
    "listen.tls_key": "server.key",
    "listen.tls_ca": "clients-ca.crt",
    "listen.unix_socket": "/run/ruvector-proxy",
    "upstream.sslmode": "verify-full",
    "upstream.sslrootcert": "root.crt",
    "upstream.sslcert": "proxy.crt",
    "upstream.sslkey": "proxy.key",
    "learner.dsn": "postgresql://user:password@127.0.0.1:5432/database",
    "learner.replica_dsn": "postgresql://user:password@replica:5432/app",
    "store.dsn": "postgresql://user:password@127.0.0.1:5432/learned",
    "log.slow_query": 0.5,
    "admin.token": "a-long-random-word",
    "auth.users_file": "users.txt",
    "auth.query_dsn": "postgresql://lookup:password@127.0.0.1:5432/postgres",
}
"""What the sample file shows for options without a default value."""

_INTRODUCTION = """\
# Configuration

<!-- Written by "python -m config.docs" from config/schema.py; change it there. -->

One TOML file, given with `--config` or in `RUVECTOR_CONFIG`. Every option can be left out, and every one can
be set in the environment as well, which wins over the file: `RUVECTOR_LISTEN_PORT` is `port` in `[listen]`.
Unknown keys and unknown `RUVECTOR_` variables are errors; `ruvector-proxy check-config` shows what holds, or
every mistake at once.

The file is read again within a second of a change, and on SIGHUP; the log says what changed. Options that
take effect at once hold for the next statement of every client, and no connection is lost. A file with a
mistake in it, or with another value for an option that takes a restart, changes nothing at all: the log
says why, `ruvector_config_last_reload_successful` is 0, and the configuration in force stays. Environment
variables cannot change while the proxy runs. Certificates and the users file are read again when they
change.

A minimal file:

```toml
[upstream]
port = 5432
[learner]
dsn = "postgresql://user:password@127.0.0.1:5432/database"
```

[config/proxy.example.toml](../config/proxy.example.toml) lists every option with its default.

In Kubernetes a service called `ruvector-...` makes the cluster set `RUVECTOR_..._PORT` and the like in every
pod, which are then refused as unknown: set `enableServiceLinks: false`, as the chart in `helm/` does.
"""

_TABLES = """\
## [tables."schema.table"]

{text}

The name is the table's own with its schema, as PostgreSQL stores it, in quotation marks:

```toml
[tables."public.items"]
target_recall = 0.99
```

In the environment all tables are one JSON value, which overrides the file key by key:
`RUVECTOR_TABLES='{{"public.items": {{"target_recall": 0.99}}}}'`.
"""


def reference() -> str:
    """Return the text of docs/configuration.md."""
    parts = [_INTRODUCTION]
    for name, section in sections().items():
        parts.append(f"## [{name}]\n\n{section.__doc__}\n")
        parts += [
            _describe(f"{name}.{key}", section, key, variable(f"{name}.{key}"))
            for key in section.model_fields
        ]
    parts.append(_TABLES.format(text=Table.__doc__))
    parts += [_describe(key, Table, key, None) for key in Table.model_fields]
    return "\n".join(parts)


def sample() -> str:
    """Return the text of config/proxy.example.toml; ``#`` without a space after it begins an option."""
    lines = [
        "# Every option of ruvector-proxy with its default; docs/configuration.md says more.",
        "# Remove the # before an option to change it.",
    ]
    for name, section in sections().items():
        lines += ["", f"[{name}]"]
        for key, field in section.model_fields.items():
            default = EXAMPLES[f"{name}.{key}"] if field.default is None else field.default
            lines += [*_comment(field.description), f"#{key} = {_toml(default)}"]
    lines += ["", *_comment(f"{Table.__doc__} One such section for each table."), '#[tables."public.items"]']
    lines += [f"#{key} = {_toml(_inherited(key))}" for key in Table.model_fields]
    return "\n".join(lines) + "\n"


def write() -> None:
    """Write both files."""
    REFERENCE.parent.mkdir(exist_ok=True)
    REFERENCE.write_text(reference(), encoding="utf-8")
    SAMPLE.write_text(sample(), encoding="utf-8")


def _describe(title: str, section: type[Section], key: str, environment: str | None) -> str:
    shape = section.model_json_schema()["properties"][key]
    facts = [f"Type: {_type(shape)}."]
    if shape["unit"]:
        facts.append(f"Unit: {shape['unit']}.")
    default = section.model_fields[key].default
    facts.append("Default: none." if default is None else f"Default: `{_toml(default)}`.")
    if environment:
        facts.append(f"Environment: `{environment}`.")
    facts.append("Takes effect: at once." if shape["live"] else "Takes effect: at a restart.")
    return f"### {title}\n\n{shape['description']}\n\n{' '.join(facts)}\n\nDownside: {shape['downside']}\n"


def _type(shape: dict[str, Any]) -> str:
    """Put a JSON schema into words."""
    if "anyOf" in shape:
        return " or ".join(_type(each) for each in shape["anyOf"] if each.get("type") != "null")
    if "const" in shape or "enum" in shape:
        return " or ".join(f"`{json.dumps(each)}`" for each in shape.get("enum", [shape.get("const")]))
    words = {"integer": "whole number", "number": "number", "boolean": "`true` or `false`", "string": "text"}
    return ", ".join([words[shape["type"]], *_limits(shape)])


def _limits(shape: dict[str, Any]) -> Iterator[str]:
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    for keyword, limit in words.items():
        if keyword in shape:
            yield f"{limit} {shape[keyword]:g}"


def _comment(text: str | None) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text or "", 100)]


def _inherited(key: str) -> object:
    """Return the value that a table gets where its own is left out."""
    return getattr(Config().table("public.items"), key)


def _toml(value: object) -> str:
    """Write a value as TOML: for booleans, numbers and plain text the same as JSON."""
    return json.dumps(str(value) if isinstance(value, Path) else value)


if __name__ == "__main__":
    write()
