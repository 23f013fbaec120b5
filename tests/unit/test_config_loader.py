"""What a user may write in the configuration, and what is said about mistakes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from config.conflicts import warnings
from config.docs import SAMPLE
from config.loader import ConfigError, known_keys, load, sections, variable
from config.schema import Config, Table

MINIMAL = """
[upstream]
port = 5433
[learner]
dsn = "postgresql://app:secret@db.example:5433/app"
"""

OTHER_VALUES: dict[str, str] = {
    "listen.host": "0.0.0.0",
    "listen.port": "7000",
    "upstream.host": "db",
    "upstream.port": "5433",
    "admin.host": "::1",
    "admin.port": "0",
    "admin.token": "0123456789abcdef",
    "admin.names": "proxy,proxy.example",
    "listen.tls_mode": "verify-full",
    "listen.tls_cert": "/etc/tls/server.pem",
    "listen.tls_key": "/etc/tls/server.key",
    "listen.tls_ca": "/etc/tls/ca.crt",
    "listen.tls_min_version": "1.3",
    "listen.unix_socket": "/run/other",
    "listen.unix_socket_mode": "0700",
    "upstream.sslmode": "verify-ca",
    "upstream.sslrootcert": "/etc/tls/root.crt",
    "upstream.sslcert": "/etc/tls/proxy.crt",
    "upstream.sslkey": "/etc/tls/proxy.key",
    "upstream.sslnegotiation": "direct",
    "workers.count": "3",
    "learner.dsn": "postgresql://me:pw@h/d",
    "learner.replica_dsn": "postgresql://me:pw@replica/d",
    "learner.budget": "0.5",
    "learner.batch": "4",
    "learner.exact_rows": "20000",
    "learning.sketch_rows": "10000",
    "learner.starting_credit": "5",
    "store.kind": "postgres",
    "store.path": "/var/lib/x",
    "store.dsn": "postgresql://store:pw@h/d",
    "store.db_schema": "learned",
    "store.group": "blue",
    "store.max_age": "60.5",
    "store.max_size": "9.5",
    "learning.enabled": "off",
    "learning.target_recall": "0.9",
    "learning.optimize_for": "latency",
    "learning.learning_rate": "0.5",
    "learning.trajectory_buffer_size": "7",
    "learning.trajectory_window": "8",
    "learning.max_patterns": "77",
    "learning.pattern_similarity": "0.97",
    "learning.min_samples": "9",
    "learning.pattern_consolidation_interval": "1.5",
    "learning.anonymize": "true",
    "auth.mode": "scram",
    "auth.users_file": "/etc/users.txt",
    "auth.query_dsn": "postgresql://lookup:pw@h/d",
    "auth.query": "SELECT * FROM lookup.verifier($1)",
    "auth.query_connections": "4",
    "auth.query_timeout": "1.5",
    "auth.query_max_age": "0",
    "auth.relay_over_tls": "true",
    "limits.connect_timeout": "2.5",
    "limits.authentication_timeout": "5",
    "limits.drain_timeout": "0",
    "limits.handover_timeout": "61",
    "learning.relay_only": "true",
    "learning.canary_share": "0.1",
    "learning.canary_seconds": "20",
    "limits.max_connections": "500",
    "limits.max_connections_per_user": "50",
    "limits.max_connections_per_database": "60",
    "limits.max_logins": "100",
    "limits.max_message": "16",
    "limits.max_memory": "900",
    "limits.keepalive_idle": "30",
    "limits.keepalive_interval": "5",
    "limits.keepalive_count": "3",
    "log.level": "debug",
    "sql.enabled": "off",
    "sql.left_to_server": "ruvector_ground_truth",
    "sql.manager": "curator",
    "sql.report_query_id": "true",
    "sql.max_measurements": "2",
    "log.format": "json",
    "log.slow_query": "0.25",
}
"""A value other than the default for every key, as the environment would give it."""


def write(directory: Path, text: str) -> Path:
    path = directory / "proxy.toml"
    path.write_text(text, encoding="utf-8")
    return path


def mistakes(path: Path | None, env: dict[str, str]) -> dict[str, str]:
    """Return the problems that loading reports, as key -> "value: reason"."""
    with pytest.raises(ConfigError) as caught:
        load(path, env)
    return {problem.key: f"{problem.value}: {problem.reason}" for problem in caught.value.problems}


def plain(value: Any) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def test_without_file_and_environment_the_defaults_hold() -> None:
    config = load(None, {"PATH": "/bin", "HOME": "/root"})
    assert config.model_copy(update={"store": Config().store}) == Config()
    assert (config.listen.port, config.upstream.port, config.admin.port) == (6432, 5432, 9464)
    assert config.learner.dsn is None


def test_four_lines_are_a_complete_configuration(tmp_path: Path) -> None:
    config = load(write(tmp_path, MINIMAL), {})
    assert config.upstream.port == 5433
    assert config.learner.dsn is not None
    assert config.learner.dsn.get_secret_value() == "postgresql://app:secret@db.example:5433/app"


def test_every_key_has_a_value_to_test_the_environment_with() -> None:
    assert set(OTHER_VALUES) == set(known_keys())


@pytest.mark.parametrize("key", known_keys())
def test_the_environment_overrides_the_file_for_every_key(key: str, tmp_path: Path) -> None:
    section, name = key.split(".")
    text = OTHER_VALUES[key]
    path = write(tmp_path, re.sub(r"^#(?=\S)", "", SAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    from_file = plain(getattr(getattr(load(path, {}), section), name))
    value = plain(getattr(getattr(load(path, {variable(key): text}), section), name))
    assert value in (text, f"{text}.0", {"off": "False", "true": "True"}.get(text))
    assert value != from_file


def test_the_store_in_postgres_needs_a_database() -> None:
    assert "set store.dsn" in mistakes(None, {"RUVECTOR_STORE_KIND": "postgres"})["RUVECTOR_STORE_KIND"]


def test_all_mistakes_are_reported_at_once_each_where_it_was_written(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        lisen = 5
        [listen]
        prt = 1
        port = 70000
        tls_mode = "prefer"
        [upstream]
        port = "5432"
        [workers]
        count = 0
        [learner]
        dsn = "mysql://me:secret@h/db"
        [learning]
        dsn = "x"
        target_recall = true
        optimize_for = "sped"
        [tables.items]
        [tables."public.items"]
        taget_recall = 0.9
        target_recall = 1.5
        """,
    )
    found = mistakes(
        path, {"RUVECTOR_LEARNER_BUDGET": "3", "RUVECTOR_LOG_LEVL": "x", "RUVECTOR_ADMIN_PORT": "many"}
    )
    assert found == {
        "lisen": ": unknown section; did you mean listen?",
        "listen.prt": ": unknown key; did you mean listen.port?",
        "listen.port": "70000: should be at most 65535",
        "listen.tls_mode": "\"prefer\": should be 'disable', 'allow', 'require', 'verify-ca' or 'verify-full'",
        "upstream.port": '"5432": should be a valid integer',
        "workers.count": "0: should be at least 1, or should be 'auto'",
        "learner.dsn": found["learner.dsn"],
        "learning.dsn": ": unknown key; did you mean learner.dsn?",
        "learning.target_recall": "true: should be a valid number",
        "learning.optimize_for": "\"sped\": should be 'recall', 'latency' or 'balanced'",
        'tables."items"': found['tables."items"'],
        'tables."public.items".taget_recall': found['tables."public.items".taget_recall'],
        'tables."public.items".target_recall': "1.5: should be at most 1",
        "RUVECTOR_LEARNER_BUDGET": "3: should be at most 1",
        "RUVECTOR_LOG_LEVL": ": unknown environment variable; did you mean RUVECTOR_LOG_LEVEL?",
        "RUVECTOR_ADMIN_PORT": '"many": should be a valid integer',
    }
    assert 'in quotation marks: [tables."public.items"]' in found['tables."items"']
    assert "begins with postgresql://" in found["learner.dsn"]


def test_the_message_names_the_file_and_counts(tmp_path: Path) -> None:
    path = write(tmp_path, "[listen]\nport = -1\nhost = ''")
    with pytest.raises(ConfigError, match=re.escape(f"{path}: 2 errors\n  listen.")):
        load(path, {})


@pytest.mark.parametrize("text", ["listen = 5", "[listen]\nport = \n", "\udcff"])
def test_a_file_of_the_wrong_shape_is_one_clear_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "proxy.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    (reason,) = mistakes(path, {}).values()
    assert re.search(r"should be a table, written \[listen\]|is not TOML: .*line 2|is not UTF-8", reason)


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    assert mistakes(tmp_path / "none.toml", {}) == {"file": ": cannot be read: No such file or directory"}


def test_nan_and_infinity_are_not_durations(tmp_path: Path) -> None:
    assert set(mistakes(write(tmp_path, "[limits]\nconnect_timeout = nan\ndrain_timeout = inf"), {})) == {
        "limits.connect_timeout",
        "limits.drain_timeout",
    }


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://me:hunter2@h:port/db",
        "postgresql://me:hunter2@h:70000/db",
        "postgresql://me:hun/ter2@h/db",
        "postgresql://me:hun#ter2@h/db",
        "postgresql://me:hun?ter2@h:1/db",
        "postgresql://me:hunter2@[::1/db",
        "host=h password=hunter2",
        "mysql://me:hunter2@h/db",
    ],
)
def test_a_bad_dsn_is_an_error_that_does_not_show_the_password(dsn: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, {"RUVECTOR_LEARNER_DSN": dsn})
    message = str(caught.value)
    assert "RUVECTOR_LEARNER_DSN = " in message
    assert "hun" not in message
    assert "ter2" not in message


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql:///db?host=/var/run/postgresql",
        "postgres://me@h1:1,h2:2/db",
        "postgresql://me:p%40ss@[::1]:5432/db?sslmode=require",
        "postgresql://",
    ],
)
def test_every_form_of_connection_uri_is_accepted(dsn: str) -> None:
    assert plain(load(None, {"RUVECTOR_LEARNER_DSN": dsn}).learner.dsn) == dsn


def test_the_state_directory_is_relative_to_the_file(tmp_path: Path) -> None:
    assert load(write(tmp_path, "[store]\npath = 'st'"), {}).store.path == tmp_path / "st"
    assert load(write(tmp_path, "[store]\npath = '/st'"), {}).store.path == Path("/st")
    assert load(None, {}).store.path == Path.cwd() / "state"


def test_the_users_file_is_relative_to_the_file(tmp_path: Path) -> None:
    text = "[auth]\nmode = 'scram'\nusers_file = 'users.txt'"
    assert load(write(tmp_path, text), {}).auth.users_file == tmp_path / "users.txt"
    assert load(None, {}).auth.users_file is None


@pytest.mark.parametrize(
    ("text", "key", "remedy"),
    [
        ("mode = 'scram'", "auth.mode", "set auth.users_file or auth.query_dsn"),
        ("query = 'SELECT 1'", "auth.query", "without auth.query_dsn"),
    ],
)
def test_options_that_cannot_hold_together_are_an_error_with_a_remedy(
    text: str, key: str, remedy: str, tmp_path: Path
) -> None:
    found = mistakes(write(tmp_path, f"[auth]\n{text}"), {})
    assert list(found) == [key]
    assert remedy in found[key]


@pytest.mark.parametrize("listen", ["require", "verify-ca", "verify-full"])
@pytest.mark.parametrize("upstream", ["require", "verify-ca", "verify-full"])
def test_relaying_between_two_connections_that_are_always_encrypted_is_refused(
    listen: str, upstream: str, tmp_path: Path
) -> None:
    ca = "tls_ca = 'a'\n" if listen != "require" else ""
    text = (
        f"[listen]\ntls_mode = '{listen}'\ntls_cert = 'c'\n{ca}"
        f"[upstream]\nsslmode = '{upstream}'\nsslrootcert = 'r'\n"
    )
    found = mistakes(write(tmp_path, text), {})
    assert list(found) == ["auth.mode"]
    for part in (
        f'"{listen}"',
        f'"{upstream}"',
        "auth.users_file",
        "auth.query_dsn",
        "auth.relay_over_tls = true",
    ):
        assert part in found["auth.mode"]
    for remedy in ("relay_over_tls = true", "mode = 'scram'\nusers_file = 'u'"):
        config = load(write(tmp_path, f"{text}[auth]\n{remedy}\n"), {})
        assert warnings(config) == []


@pytest.mark.parametrize(
    ("listen", "upstream", "warned"),
    [
        ("", "", False),
        ("", "sslmode = 'require'", False),
        ("tls_cert = 'c'", "sslmode = 'disable'", False),
        ("tls_cert = 'c'", "host = '/tmp'", False),
        ("tls_cert = 'c'\ntls_mode = 'require'", "sslmode = 'disable'", False),
        ("tls_cert = 'c'\ntls_mode = 'disable'", "sslmode = 'require'", False),
        ("tls_cert = 'c'", "", True),
        ("tls_cert = 'c'", "sslmode = 'require'", True),
        ("tls_cert = 'c'\ntls_mode = 'require'", "", True),
        ("tls_cert = 'c'\ntls_mode = 'require'", "sslmode = 'allow'", True),
        ("tls_cert = 'c'\ntls_mode = 'require'\nunix_socket = '/tmp'", "sslmode = 'require'", True),
    ],
)
def test_relaying_between_two_connections_that_may_be_encrypted_is_warned_of(
    listen: str, upstream: str, warned: bool, tmp_path: Path
) -> None:
    found = warnings(load(write(tmp_path, f"[listen]\n{listen}\n[upstream]\n{upstream}\n"), {}))
    assert len(found) == warned
    assert all("auth.relay_over_tls = true" in each for each in found)


def test_a_conflict_names_the_variable_that_made_it() -> None:
    assert list(mistakes(None, {"RUVECTOR_AUTH_MODE": "scram"})) == ["RUVECTOR_AUTH_MODE"]


def test_tables_in_the_environment_override_the_file_key_by_key(tmp_path: Path) -> None:
    path = write(tmp_path, '[tables."public.items"]\ntarget_recall = 0.9\nmin_samples = 5')
    config = load(
        path, {"RUVECTOR_TABLES": '{"public.items": {"target_recall": 0.99}, "a.b": {"learning": false}}'}
    )
    assert config.tables == {
        "public.items": Table(target_recall=0.99, min_samples=5),
        "a.b": Table(learning=False),
    }


@pytest.mark.parametrize("text", ["{", "[]", '{"public.items": 3}'])
def test_tables_that_are_not_such_json_are_an_error_with_an_example(text: str) -> None:
    assert re.search(
        "is not JSON|should be JSON such as", mistakes(None, {"RUVECTOR_TABLES": text})["RUVECTOR_TABLES"]
    )


def test_the_variable_for_the_file_itself_is_not_an_unknown_option() -> None:
    assert load(None, {"RUVECTOR_CONFIG": "proxy.toml"}).listen.port == 6432


def test_section_names_are_single_words_so_that_variables_are_unambiguous() -> None:
    assert all("_" not in name for name in sections())
    names = [variable(key) for key in [*known_keys(), "tables"]]
    assert len(names) == len(set(names))


def test_a_secret_that_is_wrong_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, {"RUVECTOR_ADMIN_TOKEN": "too short"})
    assert "RUVECTOR_ADMIN_TOKEN" in str(caught.value)
    assert "too short" not in str(caught.value)


def test_the_token_is_shown_nowhere_but_to_child_processes() -> None:
    config = load(None, {"RUVECTOR_ADMIN_TOKEN": "0123456789abcdef"})
    assert "0123456789abcdef" not in repr(config) + str(config) + config.model_dump_json()
    assert "0123456789abcdef" in config.to_json()
    assert Config.from_json(config.to_json()) == config
