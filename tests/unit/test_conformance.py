"""The harness of the third-party suites: what counts as a difference, and that none is lost on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance import exceptions, postgresql, psql
from tests.conformance.exceptions import KnownException, known_exception
from tests.conformance.harness import (
    ADAPTED,
    FAIL,
    PASS,
    SKIP,
    Difference,
    NotRunError,
    Outcome,
    Outcomes,
    Suite,
    Target,
    Way,
    build,
    compare,
)
from tests.conformance.junit import read_junit
from tests.conformance.report import Result, keep, kept_rows, page, row
from tests.conformance.suites import SUITES

D, P, F = Way.DIRECT, Way.PROXIED, Way.FORCED


def _suite(name: str = "some") -> Suite:
    def run(target: Target) -> Outcomes:
        raise AssertionError("not to be run")

    return Suite(name=name, title="a suite", prepare=lambda: "1.0", run=run)


def test_equal_outcomes_are_no_difference_whatever_they_are() -> None:
    outcomes = {"a": PASS, "b": FAIL, "c": SKIP}
    assert compare({way: dict(outcomes) for way in Way}) == []


def test_another_outcome_another_text_and_a_missing_test_are_differences() -> None:
    direct = {"status": PASS, "text": Outcome("pass", "x"), "missing": PASS, "same": PASS}
    proxied = {"status": FAIL, "text": Outcome("pass", "x"), "missing": PASS, "same": PASS}
    forced = {"status": PASS, "text": Outcome("pass", "y"), "same": PASS}
    found = compare({D: direct, P: proxied, F: forced})
    assert [(difference.test, difference.ways) for difference in found] == [
        ("missing", frozenset({F})),
        ("status", frozenset({P})),
        ("text", frozenset({F})),
    ]
    assert [str(difference) for difference in found] == [
        "missing: direct pass, proxied pass, forced did not run",
        "status: direct pass, proxied fail, forced pass",
        "text: the text differs, forced",
    ]


def test_an_exception_covers_its_own_suite_test_and_ways_only(monkeypatch: pytest.MonkeyPatch) -> None:
    known = KnownException("some", "test", frozenset({F}), "a reason")
    monkeypatch.setattr(exceptions, "KNOWN", (known,))
    forced_only = Difference("test", {D: PASS, P: PASS, F: FAIL})
    assert known_exception("some", forced_only) is known
    assert known_exception("other", forced_only) is None
    assert known_exception("some", Difference("other", forced_only.outcomes)) is None
    assert known_exception("some", Difference("test", {D: PASS, P: FAIL, F: FAIL})) is None


def test_every_exception_names_a_suite_and_a_reason() -> None:
    names = {suite.name for suite in SUITES}
    assert len(names) == len(SUITES)
    for known in exceptions.KNOWN:
        assert known.suite in names
        assert known.reason
        assert D not in known.ways


def test_the_page_shows_differences_exceptions_and_what_was_not_run(tmp_path: Path) -> None:
    runs = {way: {"a": PASS, "b": SKIP, ADAPTED: PASS} for way in Way}
    different = Result(_suite("different"), "1.0", runs, differences=compare({**runs, F: {"a": FAIL}}))
    known = Result(
        _suite("known"), "1.0", runs, known=[KnownException("known", "b", frozenset({F}), "because")]
    )
    absent = Result(_suite("absent"), trouble="java is not installed")
    broken = Result(_suite("broken"), "1.0", trouble="it crashed", broken=True)
    for result in (different, known, absent, broken):
        keep(row(result), tmp_path)
    suites = [_suite(name) for name in ("different", "known", "absent", "never", "broken")]
    text = page(kept_rows(suites, tmp_path))
    assert text.index("| different |") < text.index("| known |") < text.index("| broken |")
    assert "| different | 1.0 | 2 | 1 | 1 | 1 | 1 | 3 |" in text
    assert "- different: a: direct pass, proxied pass, forced fail" in text
    assert "| known | 1.0 | 2 | 1 | 1 | 1 | 1 | 0 (+1 known) |" in text
    assert "- known, `b` (forced): because." in text
    assert "not run: java is not installed" in text
    assert "| never |  | - | - | - | - | - | not run: not yet on this machine |" in text
    assert "broken: it crashed" in text
    assert [result.failed for result in (different, known, absent, broken)] == [True, False, False, True]


def test_a_report_in_junit_s_form_keeps_the_worst_of_two_outcomes(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="c" name="good"/>'
        '<testcase classname="c" name="bad"><failure/></testcase><testcase classname="c" name="bad"/>'
        '<testcase classname="c" name="late"/><testcase classname="c" name="late"><error/></testcase>'
        '<testcase name="left out"><skipped/></testcase></testsuite></testsuites>'
    )
    assert read_junit(report) == {"c::good": PASS, "c::bad": FAIL, "c::late": FAIL, "left out": SKIP}


def test_what_cannot_be_prepared_says_why(tmp_path: Path) -> None:
    with pytest.raises(NotRunError, match="no-such-program"):
        build([tmp_path / "no-such-program"], "starting it")
    with pytest.raises(NotRunError, match="trying failed: status 3"):
        build(["sh", "-c", "exit 3"], "trying")


def test_tests_that_crash_the_server_are_taken_out_of_a_schedule() -> None:
    schedule = "# groups\ntest: one sqljson two\ntest: hash_part\n\ntest: three\n"
    assert postgresql.without_crashes(schedule) == "# groups\ntest: one two\ntest: three\n"


def test_only_notices_and_numbers_are_moved_and_masked_in_isolation_tests() -> None:
    text = "step a\ns2: NOTICE:  hear\nstep b: OID 17\ns1: NOTICE:  hear\nERROR:  no"
    assert postgresql.notices_last(text).splitlines() == [
        "step a",
        "step b: OID ...",
        "ERROR:  no",
        "s1: NOTICE:  hear",
        "s2: NOTICE:  hear",
    ]


def test_what_no_two_runs_of_psql_share_is_masked() -> None:
    text = "Tue Nov  3 09:00:01 2026 (every 0.05s)\nserver process with PID 12.\n12 Tue 2026"
    assert psql.masked(text) == "(every 0.05s)\nserver process with PID ....\n12 Tue 2026"
