"""Run every fault, or some: ``python -m tests.chaos [--seed N] [--only WORDS] [--write docs/chaos.md]``.

The same seed gives the same faults in the same places; what clients send follows from it too, the moments at
which the operating system lets each go on do not.  Exit status 1 where the proxy has hung, answered wrongly, or not
recovered by itself.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from proxy.version import version
from tests.chaos.faults import CASES, Case, SkipError
from tests.chaos.load import Seen, wait_calm
from tests.chaos.world import World, world

RECOVERY = 60.0
"""Seconds in which the proxy has to serve again without an error, on a machine that does other things too."""


@dataclass(frozen=True)
class Outcome:
    """What one fault did."""

    case: Case
    direct: Seen
    proxied: Seen
    recovered: float | None  # seconds
    learner_back: bool
    skipped: str = ""

    @property
    def failures(self) -> list[str]:
        """What must not be, in words."""
        if self.skipped:
            return []
        found = []
        if self.proxied.wrong:
            found.append(f"wrong answers: {self.proxied.wrong[:3]}")
        if self.proxied.hangs > self.direct.hangs:
            found.append(f"{self.proxied.hangs} hangs, {self.direct.hangs} direct")
        if self.recovered is None:
            found.append(f"not serving again within {RECOVERY:g} s")
        if not self.learner_back:
            found.append("the learner did not come back")
        return found


def run(cases: Sequence[Case], seed: int, clients: int) -> list[Outcome]:
    """Run some faults one after the other, in one world."""
    outcomes = []
    with world(seed, clients) as found:
        if wait_calm(found.proxied, RECOVERY) is None:
            raise RuntimeError(f"no calm before the first fault:\n{found.proxied.seen.errors}\n{found.log}")
        for case in cases:
            outcomes.append(one(found, case, random.Random(f"{seed} {case.name}")))
            print(line(outcomes[-1]), flush=True)
            for failure in outcomes[-1].failures:
                print(f"   FAILED: {failure}\n{found.log[-3000:]}", flush=True)
    return outcomes


def one(found: World, case: Case, dice: random.Random) -> Outcome:
    """Run one fault; the clients of both roads go on meanwhile."""
    found.direct.begin()
    found.proxied.begin()
    try:
        with case.fault(found, dice):
            time.sleep(case.seconds)
    except SkipError as reason:
        return Outcome(case, Seen(), Seen(), None, True, str(reason))
    time.sleep(0.5)
    direct, proxied = found.direct.begin(), found.proxied.begin()
    recovered = wait_calm(found.proxied, RECOVERY)
    ready = found.is_ready(RECOVERY)
    return Outcome(case, direct, proxied, recovered if ready is not None else None, found.learner_is_back())


def words(seen: Seen) -> str:
    """Say what clients have seen."""
    errors = ", ".join(f"{kind} x{count}" for kind, count in sorted(seen.errors.items())) or "no error"
    return f"{errors}; {seen.answered} right" + (f", {len(seen.wrong)} WRONG" if seen.wrong else "")


def line(outcome: Outcome) -> str:
    """Return one line of the table."""
    if outcome.skipped:
        return f"| {outcome.case.name} | skipped: {outcome.skipped} | | | |"
    recovered = "no" if outcome.recovered is None else f"{outcome.recovered:.1f} s"
    verdict = "; ".join(outcome.failures) or "as it should be"
    return f"| {outcome.case.name} | {words(outcome.direct)} | {words(outcome.proxied)} | {recovered} | {verdict} |"


def page(outcomes: Sequence[Outcome], seed: int, clients: int) -> str:
    """Return docs/chaos.md."""
    total = Counter[str]()
    for outcome in outcomes:
        total["answered"] += outcome.proxied.answered
        total["wrong"] += len(outcome.proxied.wrong)
        total["hangs"] += outcome.proxied.hangs
    ran = [outcome for outcome in outcomes if not outcome.skipped]
    good = sum(not outcome.failures for outcome in ran)
    lines = [line(outcome) for outcome in outcomes]
    return _PAGE.format(
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        seed=seed,
        clients=clients,
        version=version(),
        good=good,
        ran=len(ran),
        lines="\n".join(lines),
        **total,
    )


_PAGE = """\
# Chaos

<!-- Written by "make chaos"; do not change it by hand. -->

Faults of every kind under load, and what clients saw of them. {clients} clients connect to the server itself and
{clients} through the proxy, both through the same misbehaving forwarder, so that a fault of the server or of the
network hits both alike. They send simple and extended queries, long results, transactions and vector searches, and
check every answer: a token of their own and a running number have to come back, or the neighbours that they know.
A question without an answer, an error or the end of the connection within 20 s is a hang. Behind each fault the
proxy has to serve by itself again, ready, error-free, and with its learner.

An entry such as `57P01 x3` counts errors by SQLSTATE; `closed`, `reset` and `refused` are ends of connections
without one. A client may see a clearer error through the proxy than directly (57P03 instead of a refused
connection); it must never see less.

Run of {date}, version {version}, seed {seed} (`make chaos SEED={seed}`): {good} of {ran} faults as they should be;
{answered} right answers through the proxy in their course, {wrong} wrong ones, {hangs} hangs.

| fault | direct | through the proxy | serving again after | verdict |
|---|---|---|---|---|
{lines}
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=4, help="on each road")
    parser.add_argument("--only", help="faults whose name contains this")
    parser.add_argument("--write", type=Path, help="the page to write")
    options = parser.parse_args()
    cases = [case for case in CASES if not options.only or options.only in case.name]
    outcomes = run(cases, options.seed, options.clients)
    if options.write:
        options.write.write_text(page(outcomes, options.seed, options.clients), encoding="utf-8")
    return int(any(outcome.failures for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
