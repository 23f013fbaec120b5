"""The arms worth measuring, and the table of what can be set."""

from __future__ import annotations

import itertools

import pytest

from learning.dialects import DIALECTS, STEERINGS, IndexInfo, effort_setting, ladder, row_limit

HNSW = IndexInfo("a", "hnsw")
IVF = IndexInfo("b", "ivfflat", lists=100)
PGVECTOR = {
    "hnsw.ef_search": (1.0, 1000.0),
    "hnsw.iterative_scan": (0.0, 0.0),
    "ivfflat.probes": (1.0, 32768.0),
    "ivfflat.iterative_scan": (0.0, 0.0),
}
CUSTOM = ("plan_cache_mode", "force_custom_plan")


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("indexes", [[], [HNSW], [IVF], [HNSW, IVF]])
def test_as_is_comes_first_and_exact_last_and_names_are_unique(
    filtered: bool, indexes: list[IndexInfo]
) -> None:
    arms = ladder(indexes, filtered=filtered, max_k=10)
    assert (arms[0].name, arms[0].settings) == ("as is", ())
    assert (arms[-1].name, arms[-1].kind) == ("exact", "exact")
    assert len({arm.name for arm in arms}) == len(arms)
    assert len({arm.settings for arm in arms}) == len(arms)


@pytest.mark.parametrize("max_k", [1, 10, 45, 100, 999, 1000])
def test_no_plain_hnsw_arm_returns_fewer_rows_than_the_largest_k(max_k: int) -> None:
    for filtered in (False, True):
        arms = ladder([HNSW], filtered=filtered, max_k=max_k)
        limits = [limit for arm in arms if (limit := row_limit(arm)) is not None]
        assert limits
        assert min(limits) >= max_k


def test_above_the_range_of_ef_search_only_scans_without_a_row_limit_are_left() -> None:
    for filtered, scan in ((True, "strict ef=100"), (False, "strict ef=1000")):
        arms = ladder([HNSW], filtered=filtered, max_k=1001)
        assert scan in [arm.name for arm in arms]
        assert all(row_limit(arm) is None for arm in arms)


def test_ladder_reaches_from_the_smallest_k_to_the_largest() -> None:
    plain = [arm for arm in ladder([HNSW], filtered=False, min_k=3, max_k=450) if arm.effort]
    efforts = [arm.effort for arm in plain]
    assert efforts[0] == 10  # the least rung: below it nothing is saved
    assert 450 in efforts
    assert efforts == sorted(set(efforts))
    assert all(row_limit(arm) is not None for arm in plain)  # no need to go on


def test_firm_steering_takes_the_exact_plans_away_and_soft_does_not() -> None:
    for steering, sort in zip(STEERINGS, (None, "off"), strict=True):
        arms = ladder([HNSW, IVF], filtered=False, max_k=10, steering=steering)
        assert {dict(arm.settings).get("enable_sort") for arm in arms if arm.effort} == {sort}
        assert all(CUSTOM in arm.settings for arm in arms if arm.effort)
    alone = [ladder([HNSW], filtered=False, max_k=10, steering=steering) for steering in STEERINGS]
    assert alone[0] == alone[1]  # there is nothing to steer


def test_efforts_rise_in_steps_of_at_most_a_half() -> None:
    efforts = [arm.effort for arm in ladder([HNSW], filtered=False, max_k=10) if arm.effort]
    assert efforts[0] == 10
    assert efforts[-1] == 1000
    assert all(low < high <= 1.45 * low for low, high in itertools.pairwise(efforts))


def test_every_arm_of_a_filtered_template_forces_a_custom_plan_but_as_is() -> None:
    for arm in ladder([HNSW, IVF], filtered=True, max_k=10)[1:]:
        assert CUSTOM in arm.settings, arm.name
    plain = ladder([HNSW], filtered=False, max_k=10)
    assert [arm.name for arm in plain if CUSTOM in arm.settings] == ["exact"]


def test_filtered_templates_get_iterative_scans_and_ivfflat_no_strict_one() -> None:
    modes = {dict(arm.settings).get("hnsw.iterative_scan") for arm in ladder([HNSW], filtered=True, max_k=10)}
    assert modes == {None, "strict_order", "relaxed_order"}
    modes = {
        dict(arm.settings).get("ivfflat.iterative_scan") for arm in ladder([IVF], filtered=True, max_k=10)
    }
    assert modes == {None, "relaxed_order"}


def test_with_both_indexes_each_arm_steers_the_planner_to_its_own() -> None:
    for arm in ladder([HNSW, IVF], filtered=False, max_k=10)[1:-1]:
        settings = dict(arm.settings)
        if arm.kind == "hnsw":
            assert settings["ivfflat.probes"] == "32768"
            assert settings["hnsw.ef_search"] == str(arm.effort)
        else:
            assert settings["hnsw.ef_search"] == "1000"
            assert settings["ivfflat.probes"] == str(arm.effort)


def test_probes_end_at_the_number_of_lists() -> None:
    arms = [arm for arm in ladder([IVF], filtered=False, max_k=10) if arm.effort]
    efforts = [arm.effort for arm in arms if arm.name.startswith("probes")]
    assert efforts[0] == 1
    assert efforts[-1] == 100
    assert [arm.name for arm in arms if arm not in arms[: len(efforts)]] == [
        "relaxed probes=1",
        "relaxed probes=16",
    ]


def test_settings_absent_from_the_server_are_not_used() -> None:
    old = {"hnsw.ef_search": (1.0, 1000.0)}  # pgvector before 0.8 has no iterative scan
    for arm in ladder([HNSW], filtered=True, max_k=10, available=old):
        assert {name for name, _ in arm.settings} <= {"plan_cache_mode", "enable_indexscan", "hnsw.ef_search"}
    assert [arm.name for arm in ladder([HNSW], filtered=True, max_k=10, available={})] == ["as is", "exact"]


def test_rungs_outside_the_live_range_are_dropped() -> None:
    arms = ladder([HNSW], filtered=False, max_k=10, available={"hnsw.ef_search": (1.0, 100.0)})
    assert max(arm.effort for arm in arms) == 100


def test_an_unknown_access_method_gives_no_index_arm() -> None:
    assert [arm.name for arm in ladder([IndexInfo("x", "mystery")], filtered=False, max_k=10)] == [
        "as is",
        "exact",
    ]


def test_the_effort_is_the_value_of_the_effort_setting() -> None:
    for arm in ladder([HNSW, IVF], filtered=True, max_k=10, available=PGVECTOR):
        setting = effort_setting(arm)
        assert (setting is None) == (arm.effort == 0)
        if setting is not None:
            assert dict(arm.settings)[setting] == str(arm.effort)


def test_defaults_lie_inside_their_ranges_and_everything_is_explained() -> None:
    for settings in DIALECTS.values():
        for setting in settings:
            assert setting.effect
            if setting.minimum is not None and setting.maximum is not None:
                assert setting.minimum <= float(setting.default) <= setting.maximum
            elif setting.words:
                assert setting.default in setting.words
