"""Outcomes from JUnit's XML, which pytest and node's test runner write alike."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from tests.conformance.harness import FAIL, PASS, SKIP, Outcome, Outcomes


def read_junit(path: Path) -> Outcomes:
    """Return the outcome of every test case in a report.

    A test that is reported twice (its body passed, its tear-down failed) has its worst outcome.
    """
    outcomes: Outcomes = {}
    for case in ET.parse(path).iter("testcase"):  # a file that our own runner wrote
        name = "::".join(part for part in (case.get("classname"), case.get("name")) if part)
        outcome = _outcome(case)
        if outcomes.get(name) != FAIL:
            outcomes[name] = outcome
    return outcomes


def _outcome(case: ET.Element) -> Outcome:
    if case.find("failure") is not None or case.find("error") is not None:
        return FAIL
    return SKIP if case.find("skipped") is not None else PASS
