"""What differs between two configurations, key by key, in words that show no secret.

A key is named as the user writes it: ``learner.budget``, ``tables."public.items".target_recall``.  Whether a
running proxy can take a new value is declared with the option (`config.section.option`, ``live``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from config.schema import Config, Table
from config.section import Section

_DEFAULTS = Table()


@dataclass(frozen=True, slots=True)
class Change:
    """One key with another value; `before` and `after` are JSON without secrets."""

    key: str
    before: str
    after: str
    live: bool

    def __str__(self) -> str:
        if self.before == self.after:  # of a secret nothing more can be shown
            return f"{self.key} is another ({self.after})"
        return f"{self.key} = {self.after} (was {self.before})"


def changes(before: Config, after: Config) -> list[Change]:
    """Return what has to change for `before` to become `after`, in the order of the schema."""
    found: list[Change] = []
    for name in Config.model_fields:
        old, new = getattr(before, name), getattr(after, name)
        if isinstance(old, Section):
            found += _section(name, old, new)
        else:
            for table in sorted(old.keys() | new.keys()):
                options = old.get(table, _DEFAULTS), new.get(table, _DEFAULTS)
                found += _section(f'tables."{table}"', *options)
    return found


def _section(name: str, before: Section, after: Section) -> Iterator[Change]:
    shown_before, shown_after = before.model_dump(mode="json"), after.model_dump(mode="json")
    for key, field in type(before).model_fields.items():
        if getattr(before, key) == getattr(after, key):
            continue
        extra: Any = field.json_schema_extra
        yield Change(
            f"{name}.{key}", _shown(shown_before[key]), _shown(shown_after[key]), bool(extra["live"])
        )


def _shown(value: object) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
