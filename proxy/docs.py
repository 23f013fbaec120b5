"""Write docs/cli.md from the commands' own help: ``python -m proxy.docs``; a test fails when it differs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from proxy.main import app

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

_INTRODUCTION = """\
# Command line

<!-- Written by "python -m proxy.docs" from proxy/main.py; change it there. -->

`ruvector-proxy COMMAND --help` shows what stands here.  Messages for people go to standard error, results to
standard output.

| exit code | |
|---|---|
| 0 | all well |
| 1 | something failed; standard error says what, and what to do |
| 2 | the configuration or the command line is wrong; every mistake is named |
| 3 | `status`: the proxy runs and is not ready; the reasons are shown |

`ruvector-proxy --install-completion` makes the shell that you use (bash, zsh, fish, PowerShell) complete
commands and options; `--show-completion` prints the script instead.
"""


def reference() -> str:
    """Return the text of docs/cli.md."""
    return "\n".join([_INTRODUCTION, *_described(typer.main.get_command(app), "ruvector-proxy")])


def _described(command: Any, name: str) -> Iterator[str]:
    """Describe a command, or those below it, in our words: typer's own pages differ between its versions."""
    children = getattr(command, "commands", {})
    if not children:
        yield f"## {name}\n\n{command.help}\n"
        if command.epilog:
            examples = re.sub("^Examples?: ", "", command.epilog).split("; ")
            yield "```sh\n" + "\n".join(examples) + "\n```\n"
        rows = [_parameter(each) for each in command.params]
        if rows:
            yield "\n".join(["| | |", "|---|---|", *rows]) + "\n"
    for short, child in sorted(children.items()):
        if not child.hidden:
            yield from _described(child, f"{name} {short}")


def _parameter(parameter: Any) -> str:
    option = parameter.param_type_name == "option"
    names = ", ".join(f"`{name}`" for name in parameter.opts) if option else f"`{parameter.name.upper()}`"
    default = parameter.default
    told = f" Default: `{default}`." if default not in (None, False, ()) and not callable(default) else ""
    variable = f" Environment: `{parameter.envvar}`." if getattr(parameter, "envvar", None) else ""
    return f"| {names} | {parameter.help}{told}{variable} |"


def write() -> None:
    """Write the file."""
    REFERENCE.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    write()
