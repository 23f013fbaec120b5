"""The command line, and the place where the parts are put together.

Exit codes: 0 all well, 1 something failed while running, 2 the configuration or the command line is wrong,
3 the proxy runs and is not ready (`status`).  A mistake of the user gets a message that says what to do,
never a stack trace.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from config.conflicts import warnings
from config.schema import Config
from proxy import logs
from proxy.configuration import REFUSED, read
from proxy.version import version as installed_version

app = typer.Typer(
    name="ruvector-proxy",
    help="A transparent PostgreSQL proxy that keeps vector search at a declared recall.",
    epilog="Exit codes: 0 all well; 1 something failed; 2 the configuration or the command line is wrong; "
    "3 the proxy runs and is not ready (status).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 110},
)

ConfigPath = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        envvar="RUVECTOR_CONFIG",
        help="Configuration file (TOML). Without one, defaults and RUVECTOR_* variables hold.",
        show_default=False,
    ),
]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@app.command(epilog="Example: ruvector-proxy serve --config proxy.toml")
def serve(config: ConfigPath = None) -> None:
    """Run the proxy until it gets SIGTERM or Ctrl-C."""
    from proxy.sockets import StartError
    from proxy.supervisor import Supervisor

    options = _load(config)
    logs.set_up(options.log, "supervisor")
    try:
        asyncio.run(Supervisor(options, path=config, read=lambda: read(config, os.environ)).run())
    except StartError as error:
        _fail(str(error), 1)


@app.command("check-config", epilog="Example: ruvector-proxy check-config --config proxy.toml")
def check_config(config: ConfigPath = None) -> None:
    """Read the configuration, with the environment, and show what holds, or every mistake in it."""
    options = _load(config)
    typer.echo(options.model_dump_json(indent=2))
    for warning in warnings(options):
        typer.echo(f"ruvector-proxy: warning: {warning}", err=True)


@app.command(
    epilog="Examples: ruvector-proxy explain -c proxy.toml "
    "\"SELECT id FROM items ORDER BY embedding <=> '[1,2,3]' LIMIT 10\"; "
    "ruvector-proxy explain -c proxy.toml --json --param '[1,2,3]' --param 10 "
    '"SELECT id FROM items ORDER BY embedding <=> \\$1 LIMIT \\$2"'
)
def explain(
    sql: Annotated[str, typer.Argument(help="The statement, as the application sends it.")],
    config: ConfigPath = None,
    param: Annotated[
        list[str] | None, typer.Option("--param", "-p", help="Value of $1, then $2, ...; as text.")
    ] = None,
    database: Annotated[str | None, typer.Option(help="Where several databases know the statement.")] = None,
    user: Annotated[str | None, typer.Option(help="Where several users sent the statement.")] = None,
    json: Json = False,
) -> None:
    """Show which settings a statement gets, what was measured for it, and why."""
    import msgspec

    from proxy.explaining import CannotExplainError, as_text, explain_statement

    try:
        found = explain_statement(_load(config), sql, param or (), database=database, user=user)
    except CannotExplainError as error:
        _fail("\n".join([str(error), *(f"advice: {advice.text}" for advice in error.advice)]), 1)
    typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2) if json else as_text(found))


@app.command("status", epilog="Example: ruvector-proxy status --config proxy.toml --json")
def show_status(config: ConfigPath = None, json: Json = False) -> None:
    """Show the state of the running proxy: traffic, and recall and latency by table."""
    import msgspec

    from proxy.admin.client import AdminClient, UnreachableError
    from proxy.status import as_text, ask, status

    try:
        found = status(*ask(AdminClient(_load(config).admin)))
    except UnreachableError as error:
        _fail(str(error), 1)
    typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2) if json else as_text(found))
    if not found.ready:
        raise typer.Exit(3)


@app.command(epilog="Example: ruvector-proxy top --config proxy.toml --interval 5")
def top(
    config: ConfigPath = None,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="Frames to show; without it until Ctrl-C.")
    ] = None,
) -> None:
    """Show live what the running proxy does: rates, latencies, recall by table, recent queries and why."""
    from rich.console import Console

    from proxy.admin.client import AdminClient, UnreachableError
    from proxy.top import show

    try:
        show(AdminClient(_load(config).admin), Console(), interval=interval, count=count)
    except UnreachableError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        pass


patterns = typer.Typer(
    no_args_is_help=True, help="Move learned patterns between environments, as JSON documents."
)
app.add_typer(patterns, name="patterns")

OutputPath = Annotated[Path, typer.Option("--output", "-o", help="File to write; - is standard output.")]


@patterns.command("export", epilog="Example: ruvector-proxy patterns export -c proxy.toml -o patterns.json")
def export_patterns(
    config: ConfigPath = None,
    table: Annotated[
        list[str] | None, typer.Option("--table", "-t", help="Only this table, as public.items; repeatable.")
    ] = None,
    anonymize: Annotated[
        bool, typer.Option("--anonymize", help="Leave out query vectors, and queries with filter values.")
    ] = False,
    output: OutputPath = Path("-"),
) -> None:
    """Write what was measured, by kind of query, from the store; a proxy may be running or not."""
    from proxy.patterns import PatternsError, export_patterns, write_document

    try:
        document = export_patterns(_load(config), tables=table or (), anonymize=anonymize)
        write_document(document, output)
    except PatternsError as error:
        _fail(str(error), 1)
    typer.echo(f"{document.patterns} measured queries of {len(document.entries)} kinds", err=True)


@patterns.command("import", epilog="Example: ruvector-proxy patterns import -c proxy.toml patterns.json")
def import_patterns(
    files: Annotated[list[Path], typer.Argument(help="Documents; - is standard input.")],
    config: ConfigPath = None,
    database: Annotated[str | None, typer.Option(help="Database here, where it has another name.")] = None,
    user: Annotated[str | None, typer.Option(help="Role here, where it has another name.")] = None,
) -> None:
    """Hand documents to the learner: it takes them within a second, or at its next start."""
    from proxy.patterns import PatternsError, import_patterns, read_documents

    try:
        document = read_documents(files)
        import_patterns(_load(config), document, database=database, user=user)
    except PatternsError as error:
        _fail(str(error), 1)
    typer.echo(f"{document.patterns} measured queries of {len(document.entries)} kinds handed in", err=True)


@patterns.command("merge", epilog="Example: ruvector-proxy patterns merge a.json b.json -o both.json")
def merge_patterns(
    files: Annotated[list[Path], typer.Argument(help="Documents; - is standard input.")],
    output: OutputPath = Path("-"),
) -> None:
    """Unite documents; their order, and queries that are in several of them, do not matter."""
    from proxy.patterns import PatternsError, read_documents, write_document

    try:
        document = read_documents(files)
        write_document(document, output)
    except PatternsError as error:
        _fail(str(error), 1)
    typer.echo(f"{document.patterns} measured queries of {len(document.entries)} kinds", err=True)


@app.command(epilog="Example: ruvector-proxy demo")
def demo(
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave database and proxy running until Ctrl-C.")
    ] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="A fifth of the rows and few queries: a rehearsal.")
    ] = False,
) -> None:
    """Show on real data what the proxy does for an application, beside PostgreSQL alone."""
    try:
        from bench.demo import main as run
    except ModuleNotFoundError as error:
        _fail(f'{error.name} is missing; install it with: pip install "ruvector-proxy[demo]"', 1)
    raise typer.Exit(run(keep=keep, fast=fast))


@app.command(
    epilog="Example: ruvector-proxy bench --dsn postgresql://me:secret@db:5432/shop --table items "
    "--column embedding --filter category"
)
def bench(
    dsn: Annotated[
        str, typer.Option(envvar="RUVECTOR_BENCH_DSN", help="Connection URI; SELECT on the table is enough.")
    ],
    table: Annotated[str, typer.Option(help="Table to ask for, with its schema where that is needed.")],
    column: Annotated[str, typer.Option(help="Vector column with an HNSW or IVFFlat index.")],
    filter: Annotated[
        str | None, typer.Option("--filter", help="Column for a WHERE ... = value; its values are drawn.")
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(help="Query vectors: npy, fvecs, hdf5, parquet; else moved rows of the table"),
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=1000, help="Rows for each query.")] = 10,
    target: Annotated[float, typer.Option(min=0.5, max=0.999, help="Recall that is to be kept.")] = 0.98,
    seconds: Annotated[float, typer.Option(min=30.0, help="About how long the whole may take.")] = 300.0,
    output: Annotated[Path, typer.Option(help="Directory for figures and picture.")] = Path("bench-results"),
) -> None:
    """Compare static settings and the proxy on your own table; nothing is written to it."""
    try:
        from bench.suite.own import Wish
        from bench.suite.own import main as run
    except ModuleNotFoundError as error:
        _fail(f'{error.name} is missing; install it with: pip install "ruvector-proxy[bench]"', 1)
    raise typer.Exit(run(Wish(dsn, table, column, filter, queries, k, target, seconds, output)))


@app.command()
def version() -> None:
    """Show the version."""
    typer.echo(f"ruvector-proxy {installed_version()}")


@app.command("_worker", hidden=True)
def _worker() -> None:
    """Run a worker; started by the supervisor only."""
    from proxy.children import worker

    raise typer.Exit(worker())


@app.command("_learner", hidden=True)
def _learner() -> None:
    """Run the learner; started by the supervisor only."""
    from proxy.children import learner

    raise typer.Exit(learner())


def main() -> None:
    """Run the command line."""
    app(prog_name="ruvector-proxy")


def _load(path: Path | None) -> Config:
    try:
        return read(path, os.environ)
    except REFUSED as error:
        _fail(str(error), 2)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"ruvector-proxy: {message}", err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
