"""HNSW and IVFFlat on one column: which of them serves which query, and at what price.

One embedded server, one table with both indexes, one side connection, as the learner has it.  Every query
is measured under every arm in one snapshot (learning.probe): first those that the policy is distilled from,
then others, unseen, on which it is judged.  So each line of the table compares what was chosen with the best
arm of either index *known afterwards*, on the same queries and in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psycopg
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench import dataset
from bench.dataset import Dataset
from bench.embedded import FAST_SETTINGS, EmbeddedPostgres
from learning.distillation import Options, distill
from learning.inventory import Confirmed, confirm
from learning.optimizer import SearchOptimizer
from learning.probe import measure
from learning.records import Label, Snapshot, Template, Trajectory, Trust, Value
from learning.schedule import LabelPlan
from learning.trajectory import filter_values
from learning.upstream import Session, Upstream
from learning.values import canonical
from proxy.sql import Recogniser, Scope

PLAIN = "SELECT id FROM items ORDER BY embedding <=> $1 LIMIT $2"
FILTERED = "SELECT id FROM items WHERE category = $3 ORDER BY embedding <=> $1 LIMIT $2"


@dataclass(frozen=True, slots=True)
class Line:
    """What was found for one k and filter value; recall in [0, 1], milliseconds per query."""

    context: str
    chosen: str  # the arms most often chosen
    index: str  # that the commonest one uses
    recall: float
    ms: float
    best: dict[str, tuple[str, float, float]]  # kind of arm -> name, recall, ms: the cheapest that keeps it


def create(server: EmbeddedPostgres, data: Dataset, lists: int) -> None:
    """Load the table ``items`` and build both indexes on its one vector column."""
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")
        connection.execute(
            f"CREATE TABLE items (id int PRIMARY KEY, category int, embedding vector({data.dimensions}))"
        )
        with connection.cursor().copy("COPY items FROM STDIN") as copy:
            for number, (category, vector) in enumerate(zip(data.category, data.base, strict=True)):
                copy.write_row((number, int(category), _text(vector)))
        connection.execute("CREATE INDEX items_hnsw ON items USING hnsw (embedding vector_cosine_ops)")
        connection.execute(
            f"CREATE INDEX items_ivfflat ON items USING ivfflat (embedding vector_cosine_ops) "
            f"WITH (lists = {lists})"
        )
        connection.execute("CREATE INDEX ON items (category)")
        connection.execute("ANALYZE items")


def _text(vector: NDArray[np.float32]) -> str:
    return "[" + ",".join(f"{x:.9g}" for x in vector.tolist()) + "]"


def _template(sql: str) -> Template:
    found = Recogniser().recognise(sql.encode(), Scope("postgres", "postgres", None)).vector
    assert found is not None
    return found.template


def _query(template: Template, vector: NDArray[np.float32], k: int, category: int | None) -> Trajectory:
    values: list[Value | None] = []
    for slot in template.slots:
        text = {"limit": str(k), "filter": str(category)}.get(slot.role.value)
        values.append(None if text is None else Value(0, text.encode()))
    return Trajectory(
        query_id=bytes(16),
        template=template.key,
        timestamp=0.0,
        vector=np.asarray(vector, dtype="<f4").tobytes(),
        k=k,
        offset=0,
        values=tuple(values),
        arm="as is",
        settings=(),
        trust=Trust.OBSERVE,
        policy_version=0,
        rows=-1,
        first_byte_ms=0.0,
        latency_ms=0.0,
    )


class Bench:
    """Labels, then a policy, then its choices for unseen queries."""

    def __init__(self, session: Session, target: float, console: Console) -> None:
        self._session = session
        self._target = target
        self._console = console
        self._ks: tuple[int, ...] = ()

    async def run(self, template: Template, known: list[Trajectory], unseen: list[Trajectory]) -> list[Line]:
        """Return a line for every k and filter value among the queries."""
        by_k = sorted(known, key=lambda query: query.k)
        confirmed = await confirm(
            self._session,
            template,
            known[0],
            min_k=by_k[0].k,
            max_k=by_k[-1].k,
            witnesses=(by_k[0], by_k[-1]),
        )
        assert isinstance(confirmed, Confirmed), confirmed
        names = {query: self._context(confirmed, query) for query in (*known, *unseen)}
        self._ks = () if confirmed.facts.filter_slots else tuple({query.k for query in known})
        labels = [await self._label(template, confirmed, query, names[query]) for query in known]
        options = Options(target_recall=self._target)
        policy = distill(template, confirmed.facts, confirmed.arms, labels, Counter(names.values()), options)
        self._console.print(f"{policy.trust.value}: {policy.reason}", highlight=False)
        optimizer = SearchOptimizer(Snapshot(1, 0.0, {template.key: policy}))
        tried: dict[str, list[tuple[str, Label]]] = {}
        for query in unseen:
            label = await self._label(template, confirmed, query, names[query])
            facts = confirmed.facts
            values = filter_values(query, facts.filter_slots, facts.value_types)
            vector = np.frombuffer(query.vector or b"", dtype="<f4")
            choice = optimizer.optimize(template.key, vector, query.k, values)
            tried.setdefault(names[query], []).append(
                (choice.arm.name if choice is not None else "as is", label)
            )
        return [self._line(context, confirmed, found) for context, found in tried.items()]

    @staticmethod
    def _context(confirmed: Confirmed, query: Trajectory) -> str:
        facts = confirmed.facts
        values = filter_values(query, facts.filter_slots, facts.value_types)
        return "\x1f".join((str(query.k), *(value or "" for value in values)))

    async def _label(
        self, template: Template, confirmed: Confirmed, query: Trajectory, context: str
    ) -> Label:
        measured = await measure(
            self._session,
            template,
            confirmed.types,
            confirmed.settings,
            query,
            confirmed.arms,
            context=context,
            uniform=True,
            plan=LabelPlan(),
            ks=self._ks,
        )
        return measured.label

    def _line(self, context: str, confirmed: Confirmed, tried: Sequence[tuple[str, Label]]) -> Line:
        chosen = Counter(name for name, _ in tried)
        results = [label.results[name] for name, label in tried]
        best: dict[str, tuple[str, float, float]] = {}
        for arm in confirmed.arms:
            each = [label.results[arm.name] for _, label in tried]
            recall, ms = (
                float(np.mean([result.recall for result in each])),
                float(np.mean([r.ms for r in each])),
            )
            good = recall >= self._target
            if good and (arm.kind not in best or ms < best[arm.kind][2]):
                best[arm.kind] = (arm.name, recall, ms)
        commonest = chosen.most_common(1)[0][0]
        k, _, value = context.partition("\x1f")
        share = confirmed.facts.selectivity.get(value)
        words = f"k={k}" + (
            f", category {canonical(0, 0, value.encode()) or value} ({share or 0:.1%})" if value else ""
        )
        return Line(
            context=words,
            chosen=", ".join(f"{name} x{count}" for name, count in chosen.most_common(2)),
            index=", ".join(confirmed.used.get(commonest, ())) or "none",
            recall=float(np.mean([result.recall for result in results])),
            ms=float(np.mean([result.ms for result in results])),
            best=best,
        )


async def compare(
    server: EmbeddedPostgres,
    data: Dataset,
    *,
    ks: Sequence[int],
    categories: Sequence[int],
    labels: int,
    unseen: int,
    target: float,
    console: Console,
) -> list[Line]:
    """Measure and return the table's lines: `labels` and `unseen` queries for each k and filter value."""
    rng = np.random.default_rng(0)
    queries = np.concatenate(list(data.queries.values()))
    upstream = Upstream(server.uri())
    lines: list[Line] = []
    try:
        bench = Bench(await upstream.session("postgres"), target, console)
        for sql, values in ((PLAIN, (None,)), (FILTERED, tuple(categories))):
            template = _template(sql)
            few = labels if values == (None,) else max(5, labels // 15)
            known, others = (
                [
                    _query(template, queries[row], k, value)
                    for k in ks
                    for value in values
                    for row in rng.choice(half, count, replace=False)
                ]
                for half, count in (
                    (np.arange(0, len(queries), 2), few),
                    (np.arange(1, len(queries), 2), unseen),
                )
            )
            lines += await bench.run(template, known, others)
    finally:
        await upstream.close()
    return lines


def show(lines: Sequence[Line], console: Console, target: float) -> None:
    """Print the table."""
    table = Table(
        "query", "chosen", "index", "recall", "ms", title=f"target recall {target:g}, unseen queries"
    )
    for kind in ("hnsw", "ivfflat", "exact"):
        table.add_column(f"best {kind} afterwards")
    for line in lines:
        best = (line.best.get(kind) for kind in ("hnsw", "ivfflat", "exact"))
        words = (f"{b[0]} {b[2]:.2f} ms" if b is not None else "none keeps it" for b in best)
        table.add_row(line.context, line.chosen, line.index, f"{line.recall:.3f}", f"{line.ms:.2f}", *words)
    console.print(table)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--lists", type=int, default=150)
    parser.add_argument(
        "--labels", type=int, default=120, help="for each k; a fifteenth for each filter value"
    )
    parser.add_argument("--unseen", type=int, default=60)
    parser.add_argument("--target", type=float, default=0.98)
    parser.add_argument("--data", type=Path, default=dataset.DEMO_FILE)
    given = parser.parse_args()
    console = Console(width=200)
    data = dataset.load(given.data, given.rows)
    categories = [int(c) for c in np.argsort(-np.bincount(data.category))[[0, 3, 12]]]
    with EmbeddedPostgres(settings={**FAST_SETTINGS, "shared_buffers": "512MB"}) as server:
        create(server, data, given.lists)
        lines = asyncio.run(
            compare(
                server,
                data,
                ks=(1, 10, 100, 500),
                categories=categories,
                labels=given.labels,
                unseen=given.unseen,
                target=given.target,
                console=console,
            )
        )
    show(lines, console, given.target)


if __name__ == "__main__":
    main()
