"""The benchmark suite judges fairly: derived systems, intervals, verdicts, loaders, and words that match figures."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.dataset import Dataset
from bench.demo.measurement import BLOCK, Samples
from bench.demo.workload import Query
from bench.suite import compare, loaders, plots, report, statistics, tables, traffic
from bench.suite.own import OwnError, upstream_of
from bench.suite.queries import Question, Statement, Truth
from bench.suite.records import NOISY, PASS, SHORT, Claim, Interval, Panel, Report, Result, Series
from bench.suite.scenarios.drift import Event, recovered
from bench.suite.statistics import Measured, at_least, at_most
from bench.suite.tables import Table


def measured(
    recall: dict[str, list[float]], ms: dict[str, list[float]], groups: list[str] | None = None
) -> Measured:
    samples = {}
    for name in recall:
        samples[name] = Samples()
        for r, m in zip(recall[name], ms[name], strict=True):
            samples[name].add(Query("", np.zeros(1, np.float32)), r, 10, 0, m)
    return Measured.of(samples, groups or [""] * len(next(iter(recall.values()))))


def dataset(rows: int = 400, queries: int = 300) -> Dataset:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((rows, 8)).astype(np.float32)
    families = {name: rng.standard_normal((queries, 8)).astype(np.float32) for name in ("easy", "hard")}
    return Dataset(base, rng.integers(4, size=rows).astype(np.int16), families, "test")


# -- statistics --------------------------------------------------------------------------------------------
def test_what_only_some_systems_answered_is_cut_off() -> None:
    samples = {"a": Samples(), "b": Samples()}
    for name, count in (("a", 5), ("b", 3)):
        for i in range(count):
            samples[name].add(Query("", np.zeros(1, np.float32)), 1.0, 10, 0, float(i))
    assert Measured.of(samples, ["x"] * 5).queries == 3
    with pytest.raises(ValueError, match="nothing was measured"):
        Measured.of({"a": Samples()}, [])


def test_best_static_is_the_cheapest_that_keeps_the_target_else_the_one_of_highest_recall() -> None:
    found = measured(
        {"low": [0.9] * 4, "good": [0.98] * 4, "better": [1.0] * 4},
        {"low": [1.0] * 4, "good": [2.0] * 4, "better": [3.0] * 4},
    )
    names = list(found.names)
    assert statistics.best_static(found, names, 0.98) == "good"
    assert statistics.best_static(found, ["low", "good"], 0.99) == "good"


def test_best_by_group_takes_each_groups_own_and_the_common_one_for_unknown_groups() -> None:
    found = measured(
        {"cheap": [1.0, 0.5], "dear": [1.0, 1.0]}, {"cheap": [1.0, 1.0], "dear": [5.0, 5.0]}, ["a", "b"]
    )
    best = statistics.best_by_group(found, ["cheap", "dear"], 0.98, ["a", "b", "new"])
    assert best == {"a": "cheap", "b": "dear", "new": "dear"}


def test_best_of_each_group_is_chosen_on_other_queries_than_it_is_judged_by() -> None:
    # Each system is quick on half of the queries: chosen on these very queries, one would seem quicker than any.
    lucky = [1.0, 9.0] * 10
    found = measured({"a": [1.0] * 20, "b": [1.0] * 20}, {"a": lucky, "b": lucky[::-1]}, ["x"] * 20)
    tuned = measured({"a": [1.0], "b": [1.0]}, {"a": [5.0], "b": [5.0]}, ["y"])
    choice = statistics.cross_fitted(tuned, found, ["a", "b"], 0.98)
    assert found.ms[choice, np.arange(20)].mean() == 9.0
    alone = measured({"a": [1.0], "b": [1.0]}, {"a": [1.0], "b": [9.0]}, ["x"])  # nothing else to choose by
    assert found.names[statistics.cross_fitted(tuned, alone, ["a", "b"], 0.98)[0]] in ("a", "b")


def test_oracle_spends_where_it_buys_recall_and_keeps_the_target() -> None:
    hard = [0.5] * 20 + [1.0] * 80
    found = measured({"cheap": hard, "dear": [1.0] * 100}, {"cheap": [1.0] * 100, "dear": [10.0] * 100})
    choice = statistics.oracle(found, ["cheap", "dear"], 0.98)
    derived = found.derive("oracle", choice)
    row = derived.index("oracle")
    assert derived.recall[row].mean() >= 0.98
    assert derived.ms[row].mean() <= 1.0 * 0.8 + 10.0 * 0.2
    assert set(choice[20:].tolist()) == {found.index("cheap")}


def test_latency_at_equal_recall_is_interpolated_and_a_dearer_worse_setting_does_not_count() -> None:
    recall, ms = np.array([0.9, 0.95, 1.0]), np.array([1.0, 9.0, 3.0])
    assert statistics.equal_recall_ms(recall, ms, 0.95) == pytest.approx(3.0)
    assert statistics.equal_recall_ms(recall, ms, 0.925) == pytest.approx(2.0)
    assert statistics.equal_recall_ms(recall, ms, 0.5) == pytest.approx(1.0)


def test_noise_that_hits_all_systems_alike_cancels_in_a_ratio() -> None:
    rng = np.random.default_rng(1)
    slow = np.repeat(rng.uniform(1.0, 20.0, size=20), BLOCK)  # whole blocks are slow
    found = measured(
        {"a": [1.0] * len(slow), "b": [1.0] * len(slow)},
        {"a": (0.5 * slow).tolist(), "b": slow.tolist()},
    )
    ratio = statistics.ratio(found, "a", "b")
    assert ratio.low == pytest.approx(0.5)
    assert ratio.high == pytest.approx(0.5)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(60):
        ours, other = rng.gamma(4.0, 0.7, size=300), rng.gamma(4.0, 1.0, size=300)
        found = measured({"a": [1.0] * 300, "b": [1.0] * 300}, {"a": ours.tolist(), "b": other.tolist()})
        ratio = statistics.ratio(found, "a", "b")
        covered += ratio.low <= 0.7 <= ratio.high
    assert covered >= 50


def test_few_queries_give_no_false_certainty() -> None:
    recall = [0.5] * 10 + [1.0] * 10  # not two whole blocks
    found = measured({"a": recall}, {"a": [1.0] * 20}).line("a", "static").recall
    assert found.low < 0.7
    assert found.high > 0.8


@pytest.mark.parametrize(
    ("found", "verdict"),
    [((0.9, 0.8, 0.99), PASS), ((1.0, 0.9, 1.1), NOISY), ((1.3, 1.2, 1.4), SHORT), ((1.0, 1.0, 1.0), PASS)],
)
def test_verdict_needs_the_whole_interval(found: tuple[float, float, float], verdict: str) -> None:
    assert at_most("x", 1.0, Interval(*found)).verdict == verdict
    mirrored = Interval(*(-each for each in (found[0], found[2], found[1])))
    assert at_least("x", -1.0, mirrored).verdict == verdict


def test_margin_belongs_to_the_claim_and_is_said() -> None:
    claim = at_least("recall", 0.98, Interval(0.979, 0.976, 0.982), 0.005)
    assert claim.verdict == PASS
    assert "margin 0.005" in claim.wanted


# -- queries and tables ------------------------------------------------------------------------------------
def test_no_query_is_learned_tuned_and_tested_with() -> None:
    def make(family: str, vector: np.ndarray, rng: np.random.Generator) -> Question:
        return Question(family, vector)

    split = traffic.distinct(dataset(), make, tuning=50, test=60)
    live = [next(split.live) for _ in range(2_000)]
    sets = [{query.vector.tobytes() for query in part} for part in (live, split.tuning, split.test)]
    assert [len(part) for part in sets[1:]] == [50, 60]
    assert not sets[0] & sets[1]
    assert not sets[0] & sets[2]
    assert not sets[1] & sets[2]
    with pytest.raises(ValueError, match="too few"):
        traffic.distinct(dataset(), make, tuning=200, test=200)


def test_moved_repetitions_are_near_their_originals_and_never_the_same() -> None:
    def make(family: str, vector: np.ndarray, rng: np.random.Generator) -> Question:
        return Question(family, vector)

    data = dataset()
    split = traffic.repeating(data, make, tuning=20, test=200, cosine=0.95)
    pool = np.concatenate(list(data.queries.values()))
    pool /= np.linalg.norm(pool, axis=1, keepdims=True)
    asked = np.stack([query.vector for query in split.test])
    assert (asked @ pool.T).max(axis=1) == pytest.approx(
        np.maximum(0.95, (asked @ pool.T).max(axis=1)), abs=1e-5
    )
    assert len({query.vector.tobytes() for query in split.test}) == 200
    again = traffic.repeating(data, make, tuning=20, test=200)
    assert len({query.vector.tobytes() for query in again.test}) < 150


def test_filter_columns_have_their_shares_and_one_is_correlated() -> None:
    data = dataset(rows=10_000)
    columns = tables.filter_columns(data)
    for column in ("part", "region"):
        for value, share in enumerate(tables.SHARES):
            assert (columns[column] == value).mean() == pytest.approx(share, abs=0.0011)
    centre = {
        column: np.linalg.norm(data.base[columns[column] == 3].mean(axis=0)) for column in ("part", "region")
    }
    assert centre["region"] > 3 * centre["part"]
    sizes = np.sort(np.bincount(columns["tenant"], minlength=tables.TENANTS))
    assert sizes[-1] > 20 * max(1, sizes[len(sizes) // 2]) / 2


def test_more_dimensions_leave_all_distances_as_they_were() -> None:
    base = dataset().base
    wide = tables.widened(base, 32)
    assert wide.shape == (len(base), 32)
    assert wide @ wide.T == pytest.approx(base @ base.T, abs=1e-4)
    assert (np.abs(wide).max(axis=0) > 0).all()


def test_truth_counts_by_distance_within_the_filter() -> None:
    base = np.array([[1, 0], [1, 0], [0.9, 0.1], [0, 1]], np.float32)
    truth = Truth({"t": Table("t", base, {"c": np.array([0, 1, 1, 1])})})
    vector = np.array([1, 0], np.float32)
    anything = Question("", vector, None, Statement("t", k=1), 1)
    [limit] = truth.limits([anything])
    assert truth.recall(anything, [0], limit) == truth.recall(anything, [1], limit) == 1.0  # a tie
    assert truth.recall(anything, [2], limit) == 0.0
    filtered = Question("", vector, 1, Statement("t", "c", 2), 2)
    [limit] = truth.limits([filtered])
    assert truth.recall(filtered, [1, 2], limit) == 1.0
    assert truth.recall(filtered, [0, 1], limit) == 0.5  # row 0 does not pass
    assert truth.recall(filtered, [1, 1], limit) == 0.5
    nothing = Question("", vector, 7, Statement("t", "c", 2), 2)
    assert truth.found(nothing) == 0
    assert truth.recall(nothing, [], truth.limits([nothing])[0]) == 1.0


@pytest.mark.parametrize(
    ("statement", "sql"),
    [
        (Statement("t"), "SELECT id FROM t ORDER BY embedding <=> $1 LIMIT 10"),
        (Statement("t", "c"), "SELECT id FROM t WHERE c = $2 ORDER BY embedding <=> $1 LIMIT 10"),
        (Statement("t", "c", None), "SELECT id FROM t WHERE c = $2 ORDER BY embedding <=> $1 LIMIT $3"),
        (Statement("t", None, None), "SELECT id FROM t ORDER BY embedding <=> $1 LIMIT $2"),
    ],
)
def test_statements(statement: Statement, sql: str) -> None:
    assert statement.sql == sql


def test_recovery_begins_with_the_first_query_whose_window_keeps_the_target() -> None:
    recall = np.array([1.0] * 10 + [0.0] * 5 + [1.0] * 20)
    assert recovered(recall, Event("x", 8, 10), len(recall), 10) == 5
    assert recovered(np.zeros(50), Event("x", 0, 0), 50, 10) is None


# -- loaders -----------------------------------------------------------------------------------------------
def write_fvecs(path: Path, vectors: np.ndarray) -> None:
    path.write_bytes(b"".join(struct.pack("<i", len(row)) + row.astype("<f4").tobytes() for row in vectors))


def write_bvecs(path: Path, vectors: np.ndarray) -> None:
    path.write_bytes(b"".join(struct.pack("<i", len(row)) + row.astype("u1").tobytes() for row in vectors))


def write_ivecs(path: Path, vectors: np.ndarray) -> None:
    path.write_bytes(b"".join(struct.pack("<i", len(row)) + row.astype("<i4").tobytes() for row in vectors))


def write_npy(path: Path, vectors: np.ndarray) -> None:
    np.save(path, vectors)


def write_hdf5(path: Path, vectors: np.ndarray) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file["train"], file["test"] = vectors, vectors[:7]


def write_parquet(path: Path, vectors: np.ndarray) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as arrow

    table = arrow.table({"id": list(range(len(vectors))), "emb": vectors.tolist()})
    parquet.write_table(table, path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.fvecs", write_fvecs),
        ("a.bvecs", write_bvecs),
        ("a.ivecs", write_ivecs),
        ("a.npy", write_npy),
        ("a.hdf5", write_hdf5),
        ("a.parquet", write_parquet),
    ],
)
def test_vectors_come_back_as_they_were_written(
    tmp_path: Path, name: str, write: Callable[[Path, np.ndarray], None]
) -> None:
    vectors = np.random.default_rng(0).integers(1, 200, size=(50, 6)).astype(np.float32)
    write(tmp_path / name, vectors)
    assert (loaders.read(tmp_path / name) == vectors).all()


def test_queries_come_from_the_file_from_the_one_beside_it_or_are_held_out(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)
    write_fvecs(tmp_path / "sift_base.fvecs", vectors)
    alone = loaders.dataset_of(tmp_path / "sift_base.fvecs")
    assert (len(alone.base), len(alone.queries["queries"])) == (270, 30)
    write_fvecs(tmp_path / "sift_query.fvecs", vectors[:11])
    beside = loaders.dataset_of(tmp_path / "sift_base.fvecs", limit=100)
    assert (len(beside.base), len(beside.queries["queries"])) == (100, 11)
    assert len(np.unique(beside.category)) > 10
    write_hdf5(tmp_path / "a.hdf5", vectors)
    assert len(loaders.dataset_of(tmp_path / "a.hdf5").queries["queries"]) == 7
    assert len(loaders.dataset_queries(tmp_path / "a.hdf5")) == 7


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"1 2 3", "unknown form"),
        ("a.fvecs", b"", "empty"),
        ("a.fvecs", struct.pack("<i", 3) + bytes(11), "no whole number of rows"),
        ("b.fvecs", struct.pack("<iffiff", 2, 1, 1, 3, 1, 1), "differ in length"),
        ("a.npy", b"nonsense", "cannot be read"),
        ("a.npy", None, "is not there"),
    ],
)
def test_files_that_are_none_are_refused_in_words(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(loaders.LoaderError, match=words):
        loaders.read(tmp_path / name)


def test_vectors_without_direction_are_left_out(tmp_path: Path) -> None:
    vectors = np.ones((100, 4), np.float32)
    vectors[3], vectors[5, 0] = 0, np.nan
    np.save(tmp_path / "a.npy", vectors)
    assert len(loaders.dataset_of(tmp_path / "a.npy").base) == 98 - 10


# -- the user's own table ----------------------------------------------------------------------------------
def test_a_uri_gives_the_upstream_and_the_learner_gets_a_read_only_one() -> None:
    found = upstream_of("postgresql://me:s%40crit@db:6000/shop?sslmode=require")
    assert (found.host, found.port, found.user, found.database) == ("db", 6000, "me", "shop")
    assert found.password == "s@crit"
    assert found.sslmode == "require"
    assert "default_transaction_read_only=on" in found.dsn
    assert upstream_of("postgresql://me@/shop?host=/run/pg&port=5433").host == "/run/pg"


@pytest.mark.parametrize(
    "dsn", ["host=db dbname=x", "mysql://me@db/x", "postgresql://db/x", "postgresql://me@db"]
)
def test_a_uri_that_says_too_little_is_refused(dsn: str) -> None:
    with pytest.raises(OwnError, match="postgresql://user:password"):
        upstream_of(dsn)


# -- words and pictures ------------------------------------------------------------------------------------
def a_report(verdict: str = PASS) -> Report:
    found = Interval(1.02, 0.99, 1.06)
    result = Result("some scenario", "A title", "A question?")
    result.claims = [Claim("latency (as it comes: 3.1)", "<= 1.05", found, verdict)]  # type: ignore[arg-type]
    result.panels = [
        Panel(
            "x",
            "ms",
            "recall",
            [Series("through the proxy", [1.0, 2.0], [0.9, 0.95], "star", ["a", "b"])],
            log_x=True,
        )
    ]
    failed = Result("other", "other", "", error="it broke")
    return Report({"PostgreSQL": "18"}, [result, failed], 60.0)


def test_record_survives_its_file(tmp_path: Path) -> None:
    a_report().save(tmp_path / "a.json")
    assert Report.load(tmp_path / "a.json") == a_report()


def test_page_leads_with_what_does_not_help_and_hides_no_failure() -> None:
    page = report.page(a_report(SHORT))
    assert page.index("does not help") < page.index("Where it helps")
    assert "| A title | latency (as it comes: 3.1) | <= 1.05 | 1.02 (0.99 to 1.06) |" in page
    assert "other: it broke" in page
    assert "../bench/results/some-scenario.png" in page


def test_page_of_the_docs_is_made_from_the_results() -> None:
    results = Path(report.__file__).parents[1] / "results" / "results.json"
    if not results.exists():
        pytest.skip("no full run is kept")
    assert report.PAGE.read_text() == report.page(Report.load(results))
    for result in Report.load(results).results:
        assert not result.panels or (results.parent / report.picture(result)).exists()


def test_picture_is_drawn_from_the_record(tmp_path: Path) -> None:
    plots.draw(a_report().results[0], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("second", "code"), [(PASS, 0), (NOISY, 0), (SHORT, 1)])
def test_only_a_contradiction_between_two_runs_is_an_error(
    tmp_path: Path, second: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    a_report(PASS).save(tmp_path / "a.json")
    a_report(second).save(tmp_path / "b.json")
    assert compare.main(tmp_path / "a.json", tmp_path / "b.json") == code
    assert ("CONTRADICTION: 1" in capsys.readouterr().out) is bool(code)
