"""The command line: exit codes, and messages without stack traces."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from proxy import docs
from proxy.main import app

NO_OPTIONS = {"RUVECTOR_CONFIG": None}


def run(*arguments: str, **env: str) -> tuple[int, str, str]:
    """Run the command line in this process; return exit code, output and error output."""
    result = CliRunner().invoke(app, list(arguments), env={**NO_OPTIONS, **env}, prog_name="ruvector-proxy")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("command", ["serve", "check-config", "explain", "status", "top", "demo", "version"])
def test_every_command_is_listed_and_explains_itself(command: str) -> None:
    code, listed, _ = run("--help")
    assert (code, command in listed) == (0, True)
    code, text, _ = run(command, "--help")
    assert code == 0
    assert f"Usage: ruvector-proxy {command} [OPTIONS]" in text


@pytest.mark.parametrize("command", ["serve", "check-config", "status", "top", "demo"])
def test_help_shows_an_example(command: str) -> None:
    assert f"Example: ruvector-proxy {command}" in run(command, "--help")[1]


@pytest.mark.parametrize("command", ["status", "top"])
def test_where_no_proxy_answers_is_exit_code_1_with_the_address(command: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))  # nobody listens there
        port = str(other.getsockname()[1])
        code, _, errors = run(command, RUVECTOR_ADMIN_PORT=port)
    assert code == 1
    assert f"no proxy answers at http://127.0.0.1:{port} (" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("reasons", [[], ["no worker is up"]])
def test_status_tells_whether_the_proxy_is_ready_by_its_exit_code(
    reasons: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overview = {
        "version": "1",
        "reasons": reasons,
        "relay_only": None,
        "config_refused": "",
        "learner_away": "x",
        "learner": None,
    }
    monkeypatch.setattr("proxy.status.ask", lambda client: (overview, {}))
    code, text, _ = run("status", "--json")
    assert (code, json.loads(text)["reasons"]) == (3 if reasons else 0, reasons)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands(shell: str) -> None:
    """As the scripts of --install-completion ask for it."""
    words = {
        "COMP_WORDS": "ruvector-proxy sta",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "ruvector-proxy sta",
    }
    done = subprocess.run(
        [sys.executable, "-P", "-m", "proxy.main"],
        env={
            **os.environ,
            **words,
            "_RUVECTOR_PROXY_COMPLETE": f"complete_{shell}",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "status" in done.stdout
    assert "explain" not in done.stdout


def test_the_children_commands_are_hidden() -> None:
    listed = run("--help")[1]
    assert "_worker" not in listed
    assert "_learner" not in listed


def test_the_version_is_shown() -> None:
    code, text, _ = run("version")
    assert code == 0
    assert text.startswith("ruvector-proxy ")


@pytest.mark.parametrize("command", ["serve", "check-config"])
@pytest.mark.parametrize(
    ("text", "problem"), [('"alice" secret\n', "line 1: should be"), (None, "cannot be read: No such file")]
)
def test_a_users_file_that_cannot_be_used_is_an_error(
    command: str, text: str | None, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "proxy.toml").write_text('[auth]\nmode = "scram"\nusers_file = "users.txt"\n')
    if text is not None:
        (tmp_path / "users.txt").write_text(text)
    code, _, error = run(command, "--config", str(tmp_path / "proxy.toml"))
    assert code == 2
    assert f"auth.users_file {tmp_path / 'users.txt'}:\n  {problem}" in error
    assert "secret" not in error


def test_check_config_shows_what_holds_without_the_password(tmp_path: Path) -> None:
    path = tmp_path / "proxy.toml"
    path.write_text('[learner]\ndsn = "postgresql://me:hunter2@h/db"\n')
    code, text, _ = run("check-config", "--config", str(path), RUVECTOR_LISTEN_PORT="7000")
    assert code == 0
    shown = json.loads(text)
    assert (shown["listen"]["host"], shown["listen"]["port"]) == ("127.0.0.1", 7000)
    assert shown["learner"]["dsn"] == "postgresql://me:***@h/db"


def test_the_file_may_be_named_in_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "proxy.toml"
    path.write_text("[upstream]\nport = 5433\n")
    assert json.loads(run("check-config", RUVECTOR_CONFIG=str(path))[1])["upstream"]["port"] == 5433


@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_a_bad_configuration_is_exit_code_2_with_every_mistake(command: str, tmp_path: Path) -> None:
    path = tmp_path / "proxy.toml"
    path.write_text("[listen]\nprt = 1\nport = 70000\n")
    code, _, errors = run(command, "-c", str(path))
    assert code == 2
    assert errors.startswith(f"ruvector-proxy: {path}: 2 errors\n")
    assert "did you mean listen.port?" in errors
    assert "listen.port = 70000: should be at most 65535" in errors


@pytest.mark.parametrize("arguments", [["serve", "--no-such-option"], ["no-such-command"]])
def test_a_wrong_command_line_is_exit_code_2(arguments: list[str]) -> None:
    assert run(*arguments)[0] == 2


def test_a_port_in_use_is_exit_code_1_with_the_address(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, _, errors = run("serve", RUVECTOR_LISTEN_PORT=str(port))
    assert code == 1
    assert f"ruvector-proxy: cannot listen on 127.0.0.1:{port}: Address already in use" in errors
    assert "Traceback" not in errors


def test_a_demo_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bench.demo", None)
    code, _, errors = run("demo")
    assert code == 1
    assert 'pip install "ruvector-proxy[demo]"' in errors


@pytest.mark.parametrize("code", [0, 1])
def test_the_demo_gets_its_options_and_gives_its_exit_code(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, bool] = {}

    def main(keep: bool, fast: bool) -> int:
        given.update(keep=keep, fast=fast)
        return code

    fake = ModuleType("bench.demo")
    fake.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bench.demo", fake)
    assert run("demo", "--fast")[0] == code
    assert given == {"keep": False, "fast": True}


def test_the_reference_in_the_repository_is_up_to_date() -> None:
    assert docs.REFERENCE.read_text(encoding="utf-8") == docs.reference(), "run: python -m proxy.docs"
