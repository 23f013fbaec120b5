"""Licences: permissive or named with a reason, and the page lists what is installed."""

from __future__ import annotations

import pytest

from tests.licences import OTHERS, PAGE, closure, is_permitted, sections


def test_every_dependency_has_a_permitted_licence() -> None:
    refused = {
        name: licence
        for rows in sections().values()
        for name, licence in rows.items()
        if not is_permitted(licence) and name not in OTHERS
    }
    assert refused == {}


def test_nothing_that_runs_the_proxy_needs_an_exception() -> None:
    assert closure(("",)).isdisjoint(OTHERS)
    assert len(closure(("",))) > 14


def test_the_page_lists_what_is_installed() -> None:
    """Other versions of Python need other packages: those that are missing here may stand there."""
    text = PAGE.read_text()
    missing = [name for rows in sections().values() for name in rows if f"\n| {name} | " not in text]
    assert missing == [], "run make licences"


@pytest.mark.parametrize(
    ("licence", "permitted"),
    [
        ("MIT", True),
        ("Apache-2.0 OR GPL-3.0-only", True),
        ("MIT AND GPL-3.0-only", False),
        ("LGPL-3.0-only", False),
        ("UNKNOWN", False),
        ("Apache Software License; MIT License", True),
        ("Mozilla Public License 2.0 (MPL 2.0)", False),
    ],
)
def test_licences_are_told_apart(licence: str, permitted: bool) -> None:
    assert is_permitted(licence) is permitted
