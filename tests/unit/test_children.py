"""A child ends when it is asked to, when its supervisor is gone, and never otherwise unnoticed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from pydantic import SecretStr

from config.schema import Config, Learner
from proxy.child import child_environment, own_command
from proxy.children import READY, Configure, Reload, Task

pytestmark = pytest.mark.slow  # processes are started

CHILD = """
import asyncio, sys, uvloop
from proxy import children

async def until_stop(task, config, orders):
    children._announce()
    await orders.stop.wait()

async def at_once(task, config, orders):
    children._announce()

async def fails(task, config, orders):
    raise ValueError(f"cannot use {config.learner.dsn.get_secret_value()}")

async def counts(task, config, orders):
    children._announce()
    for _ in range(2):
        await orders.reload.wait()
        orders.reload.clear()
        print("reloaded", flush=True)
    await orders.stop.wait()

async def configured(task, config, orders):
    children._announce()
    config = await orders.configs.get()
    print(config.learner.budget, flush=True)
    import logging
    logging.debug("now heard")
    await orders.stop.wait()

async def deaf(task, config, orders):
    children._announce()
    await asyncio.sleep(3600)

sys.exit(children._main(globals()[sys.argv[1]], getattr(sys.modules[sys.argv[2]], "run")))
"""


def start(
    work: str, directory: Path, runner: str = "uvloop", patience: float = 10.0, more: bytes = b""
) -> subprocess.Popen[bytes]:
    """Start a child as the supervisor does, with its task written and standard input still open."""
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", CHILD, work, runner],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=child_environment(directory),
    )
    config = Config(learner=Learner(dsn=SecretStr("postgresql://me:hunter2@h/db")))
    assert child.stdin is not None
    child.stdin.write(
        msgspec.json.encode(Task("worker 7", config.to_json(), patience=patience)) + b"\n" + more
    )
    child.stdin.flush()
    return child


def finish(child: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Wait for the end of a child; return its exit code and what it logged."""
    with child:
        assert child.stderr is not None
        log = child.stderr.read().decode()
        return child.wait(20), log


def read_ready(child: subprocess.Popen[bytes]) -> None:
    assert child.stdout is not None
    assert child.stdout.readline() == READY


@pytest.mark.parametrize("runner", ["uvloop", "asyncio"])
@pytest.mark.parametrize("reason", ["SIGTERM", "end of standard input"])
def test_a_child_that_is_asked_to_stop_ends_well(reason: str, runner: str, tmp_path: Path) -> None:
    child = start("until_stop", tmp_path, runner)
    read_ready(child)
    child.send_signal(signal.SIGINT)  # Ctrl-C is the supervisor's business
    if reason == "SIGTERM":
        child.send_signal(signal.SIGTERM)
        assert finish(child) == (0, "")
    else:
        assert child.stdin is not None
        child.stdin.close()
        assert finish(child) == (0, "")


def test_a_child_that_does_not_listen_is_ended_when_its_patience_is_over(tmp_path: Path) -> None:
    child = start("deaf", tmp_path, patience=0.3)
    read_ready(child)
    child.send_signal(signal.SIGTERM)
    code, log = finish(child)
    assert code == 1
    assert "worker 7" in log
    assert "not finished 0.3 s after the request to stop" in log


def test_a_child_that_ends_unasked_has_failed(tmp_path: Path) -> None:
    code, log = finish(start("at_once", tmp_path))
    assert code == 1
    assert "ended without having been asked to" in log


def test_a_failure_is_logged_with_its_stack_but_without_the_password(tmp_path: Path) -> None:
    code, log = finish(start("fails", tmp_path))
    assert code == 1
    assert "Traceback" in log
    assert "ValueError: cannot use postgresql://me:***@h/db" in log
    assert "hunter2" not in log


@pytest.mark.parametrize("kind", ["worker", "learner"])
def test_the_hidden_commands_refuse_to_run_without_a_supervisor(kind: str, tmp_path: Path) -> None:
    done = subprocess.run(
        own_command(kind),
        env=child_environment(tmp_path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert b"use: ruvector-proxy serve" in done.stderr


def test_another_configuration_reaches_a_child_and_its_log(tmp_path: Path) -> None:
    another = Config.model_validate({"log": {"level": "debug"}, "learner": {"budget": 0.5}})
    message = msgspec.json.encode(Configure(another.to_json())) + b"\n"
    child = start("configured", tmp_path, more=b'{"type": "Unheard-of"}\n' + message)
    read_ready(child)
    assert child.stdout is not None
    assert child.stdout.readline() == b"0.5\n"
    child.send_signal(signal.SIGTERM)
    code, log = finish(child)
    assert code == 0
    assert "DEBUG   worker 7" in log
    assert "now heard" in log
    assert "what this version does not understand" in log


def test_messages_are_heard_however_they_arrive(tmp_path: Path) -> None:
    """One right behind the task, one in two parts."""
    child = start("counts", tmp_path, more=msgspec.json.encode(Reload()) + b"\n")
    read_ready(child)
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == b"reloaded\n"
    child.stdin.write(b'{"type":')
    child.stdin.flush()
    child.stdin.write(b'"Reload"}\n')
    child.stdin.flush()
    assert child.stdout.readline() == b"reloaded\n"
    child.stdin.close()
    assert finish(child) == (0, "")
