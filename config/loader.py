"""Load the configuration from a TOML file and the environment, and report every mistake at once.

Precedence: environment variable, then file, then default.  ``RUVECTOR_LISTEN_PORT`` is ``port`` in
``[listen]``; ``RUVECTOR_TABLES`` is JSON, ``{"public.items": {"target_recall": 0.99}}``, and overrides key by
key.

Values are merged first and validated once, so that one report holds all problems.  Each names the key where
the user wrote it (file or environment variable), the value unless it is secret, the reason, and for an
unknown key the nearest known one.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import SecretStr, ValidationError
from pydantic_core import ErrorDetails

from config.conflicts import conflicts
from config.dsn import redact_dsn
from config.schema import SYSTEM, Config, Table
from config.section import Section

PREFIX = "RUVECTOR_"
NOT_OPTIONS = frozenset({"RUVECTOR_CONFIG"})
"""Environment variables of the command line, which are no options of the configuration."""

_TRUE, _FALSE = frozenset({"true", "yes", "on", "1"}), frozenset({"false", "no", "off", "0"})


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: where the user wrote it, the value as it may be shown ("" for none), and what is wrong."""

    key: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}{' = ' if self.value else ''}{self.value}: {self.reason}"


class ConfigError(Exception):
    """The configuration cannot be used; `problems` holds every mistake in it."""

    def __init__(self, source: str, problems: list[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        super().__init__("\n  ".join([f"{source}: {count}", *map(str, problems)]))


def sections() -> dict[str, type[Section]]:
    """Return the sections with fixed keys by name; ``tables``, whose keys are tables, is not one."""
    found = {}
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found[name] = field.annotation
    return found


def known_keys() -> dict[str, Any]:
    """Return every fixed key, dotted (``listen.port``), with its type."""
    return {
        f"{name}.{key}": field.rebuild_annotation()
        for name, section in sections().items()
        for key, field in section.model_fields.items()
    }


def variable(key: str) -> str:
    """Return the environment variable for a dotted key."""
    return PREFIX + key.replace(".", "_").upper()


def load(path: Path | None, env: Mapping[str, str]) -> Config:
    """Return the configuration in the file at `path` (None: defaults) as overridden by the environment.

    Raises
    ------
    ConfigError
        The file cannot be read or parsed, or holds mistakes: all of them, with those of the environment.
    """
    source = str(path) if path else "configuration"
    data = _read(path) if path else {}
    overrides, problems = _overrides(env)
    names = {key: variable(key) for key in overrides}
    for key, value in overrides.items():
        name, _, option = key.partition(".")
        section = data.setdefault(name, {})
        if isinstance(section, dict):  # else the validation reports it
            section[option] = value
    problems += _merge_tables(data, env)
    try:
        config = _with_absolute_paths(Config.model_validate(data), path.parent if path else Path())
    except ValidationError as error:
        problems += _explain(error, names)
    else:
        problems += [Problem(names.get(key, key), "", reason) for key, reason in conflicts(config)]
    if problems:
        raise ConfigError(source, problems)
    return config


def _with_absolute_paths(config: Config, base: Path) -> Config:
    """Let relative paths start at `base`."""
    sections = {}
    for name in Config.model_fields:
        section = getattr(config, name)
        if isinstance(section, Section):
            paths = {key: (base / value).absolute() for key, value in section if _is_file(value)}
            if paths:
                sections[name] = section.model_copy(update=paths)
    return config.model_copy(update=sections)


def _is_file(value: object) -> bool:
    return isinstance(value, Path) and value != SYSTEM


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [Problem("file", "", f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [Problem("file", "", "is not UTF-8 text")]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(path), [Problem("file", "", f"is not TOML: {error}")]) from error


def _overrides(env: Mapping[str, str]) -> tuple[dict[str, Any], list[Problem]]:
    """Return the values that the environment gives, by dotted key, and the variables that name no key."""
    types = known_keys()
    keys = {variable(key): key for key in types}
    values: dict[str, Any] = {}
    problems = []
    for name, text in env.items():
        if name in keys:
            values[keys[name]] = _from_text(text, types[keys[name]])
        elif name.startswith(PREFIX) and name not in NOT_OPTIONS and name != variable("tables"):
            problems.append(
                Problem(name, "", _unknown("environment variable", name, [*keys, variable("tables")]))
            )
    return values, problems


def _from_text(text: str, type_: Any) -> Any:
    """Turn an environment string into the TOML value that it stands for; what does not fit stays a string."""
    options = _alternatives(type_)
    if bool in options and text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    for number in (int, float):
        if number in options or (number is int and float in options):
            try:
                return number(text)
            except ValueError:
                continue
    return text


def _alternatives(type_: Any) -> set[Any]:
    """Return the plain types that a possibly optional, annotated or united type is made of."""
    if get_origin(type_) is Annotated:
        return _alternatives(get_args(type_)[0])
    if get_origin(type_) in (Union, UnionType):
        return set().union(*map(_alternatives, get_args(type_)))
    return {type_}


def _merge_tables(data: dict[str, Any], env: Mapping[str, str]) -> list[Problem]:
    name = variable("tables")
    if name not in env:
        return []
    try:
        given = json.loads(env[name])
    except ValueError as error:
        return [Problem(name, env[name], f"is not JSON: {error}")]
    if not isinstance(given, dict) or not all(isinstance(options, dict) for options in given.values()):
        return [Problem(name, env[name], 'should be JSON such as {"public.items": {"target_recall": 0.99}}')]
    tables = data.setdefault("tables", {})
    if isinstance(tables, dict):
        for table, options in given.items():
            own = tables.get(table)
            tables[table] = {**own, **options} if isinstance(own, dict) else options
    return []


def _explain(error: ValidationError, names: Mapping[str, str]) -> list[Problem]:
    """Turn pydantic's errors into problems, one per key: the members of a union are joined with "or"."""
    by_key: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(_key(detail["loc"]), []).append(detail)
    problems = []
    for key, details in by_key.items():
        reason = ", or ".join(dict.fromkeys(_reason(key, detail) for detail in details))
        unknown = details[0]["type"] == "extra_forbidden"
        value = "" if unknown else _show(key, details[0]["input"])
        problems.append(Problem(names.get(key, key), value, reason))
    return problems


def _key(location: tuple[int | str, ...]) -> str:
    """Return the key as written in the file; what pydantic adds for the members of a union is cut off."""
    if location[0] != "tables":
        return ".".join(map(str, location[:2]))
    return ".".join(
        [
            "tables",
            *(f'"{name}"' for name in location[1:2]),
            *(str(name) for name in location[2:3] if name != "[key]"),
        ]
    )


def _reason(key: str, detail: ErrorDetails) -> str:
    if detail["type"] == "extra_forbidden":
        if key.startswith("tables."):
            prefix = key.rpartition(".")[0]
            return _unknown("key", key, [f"{prefix}.{name}" for name in Table.model_fields])
        return (
            _unknown("key", key, list(known_keys()))
            if "." in key
            else _unknown("section", key, list(Config.model_fields))
        )
    if detail["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return f"should be a table, written [{key}]"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be ", "should be ")
    return message.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")


def _unknown(kind: str, name: str, known: list[str]) -> str:
    """Say that a name is unknown, and which is nearest: by spelling, else the same word elsewhere."""
    word = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    near = near or [other for other in known if other.rpartition(".")[2] == word]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown {kind}" + (f"; did you mean {near[0]}?" if near else "")


def _show(key: str, value: Any) -> str:
    if known_keys().get(key) is not None and SecretStr in _alternatives(known_keys()[key]):
        return redact_dsn(value) if isinstance(value, str) and key.endswith("dsn") else "***"
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + "..."
