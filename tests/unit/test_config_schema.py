"""What holders of a `Config` may rely on."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from config.dsn import check_dsn, redact_dsn
from config.schema import Auth, Config, Learner, Learning, Table, TableOptions, Upstream, Workers, host_port

SECRET = "postgresql://me:hunter2@db.example:5432/app?host=/tmp&sslpassword=hunter2"


def with_secret() -> Config:
    return Config(
        learner=Learner(dsn=SecretStr(SECRET)),
        auth=Auth(mode="scram", query_dsn=SecretStr(SECRET)),
        tables={"public.items": Table(target_recall=0.5)},
    )


def test_a_config_survives_the_way_to_a_child_process() -> None:
    config = with_secret()
    assert Config.from_json(config.to_json()) == config


def test_secrets_are_in_the_childs_json_only() -> None:
    config = with_secret()
    assert "hunter2" in config.to_json()
    for shown in (repr(config), str(config), config.model_dump_json(), str(config.model_dump(mode="json"))):
        assert "hunter2" not in shown
        assert "***" in shown
    assert config.to_json().count("hunter2") == 4
    assert config.auth.redacted_query_dsn == config.learner.redacted_dsn
    assert config.learner.redacted_dsn == "postgresql://me:***@db.example:5432/app?host=/tmp&sslpassword=***"


def test_a_validation_error_does_not_show_the_secret() -> None:
    with pytest.raises(ValidationError) as caught:
        Config.from_json('{"learner": {"dsn": "mysql://me:hunter2@h/db"}}')
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("dsn", "shown"),
    [
        ("postgresql://me@h/db", "postgresql://me@h/db"),
        ("postgresql://me:@h/db", "postgresql://me:***@h/db"),
        ("postgresql:///db", "postgresql:///db"),
        ("postgresql://me:a/b@h/db", "***"),
        ("dbname=x password=y", "***"),
        ("postgresql://[", "***"),
    ],
)
def test_a_dsn_is_shown_without_password_or_not_at_all(dsn: str, shown: str) -> None:
    assert redact_dsn(dsn) == shown


@given(
    st.text(max_size=5),
    st.sampled_from(["", "h", "h:1", "h:x", "h1,h2:5", "[::1]:5", "[", "h/x@y"]),
    st.sampled_from(["", "/db", "/db?host=/tmp", "?password=HUSH", "/db?sslPassword=HUSH&x=1", "#x"]),
)
def test_no_part_of_a_password_is_ever_shown(special: str, hosts: str, rest: str) -> None:
    dsn = f"postgresql://me:HUSH{special}HUSH@{hosts}{rest}"
    assert "HUSH" not in redact_dsn(dsn)
    assert "HUSH" not in complaint(dsn)


def complaint(dsn: str) -> str:
    """Return what is said against a connection URI, if anything."""
    try:
        check_dsn(dsn)
    except ValueError as error:
        return str(error)
    return ""


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Config().listen.port = 1


def test_a_table_inherits_what_it_does_not_set() -> None:
    common = Learning(
        target_recall=0.9, optimize_for="recall", min_samples=7, trajectory_window=50, max_patterns=70
    )
    config = Config(
        learning=common,
        tables={
            "public.items": Table(
                target_recall=0.99,
                optimize_for="latency",
                learning_rate=0.2,
                trajectory_window=1000,
                max_patterns=1000,
                pattern_similarity=0.9,
            )
        },
    )
    assert config.table("public.items") == TableOptions(
        adaptive_search=True,
        learning=True,
        target_recall=0.99,
        optimize_for="latency",
        min_samples=7,
        learning_rate=0.2,
        trajectory_window=1000,
        max_patterns=1000,
        pattern_similarity=0.9,
    )
    assert config.table("public.other") == TableOptions(
        adaptive_search=True,
        learning=True,
        target_recall=0.9,
        optimize_for="recall",
        min_samples=7,
        learning_rate=0.01,
        trajectory_window=50,
        max_patterns=70,
        pattern_similarity=0.999,
    )


@pytest.mark.parametrize(
    ("enabled", "own", "learning", "adaptive"),
    [
        (True, Table(), True, True),
        (True, Table(adaptive_search=False), True, False),
        (True, Table(learning=False), False, False),
        (False, Table(), False, False),
        (False, Table(learning=True), False, False),
    ],
)
def test_what_is_not_learned_about_is_not_adapted(
    enabled: bool, own: Table, learning: bool, adaptive: bool
) -> None:
    options = Config(learning=Learning(enabled=enabled), tables={"a.b": own}).table("a.b")
    assert (options.learning, options.adaptive_search) == (learning, adaptive)


def test_auto_is_at_least_one_worker_and_a_number_is_itself() -> None:
    assert Workers(count="auto").resolved >= 1
    assert Workers(count=3).resolved == 3


def test_an_upstream_beginning_with_a_slash_is_a_socket_directory() -> None:
    assert Upstream(host="/run/pg", port=5433).socket_path == Path("/run/pg/.s.PGSQL.5433")
    assert Upstream(host="/run/pg", port=5433).address == "/run/pg/.s.PGSQL.5433"
    assert Upstream(host="db", port=5433).socket_path is None
    assert Upstream(host="db", port=5433).address == "db:5433"
    assert host_port("::1", 1) == "[::1]:1"
