"""Advice: each finding is named with its figures, and only where something speaks for it."""

from __future__ import annotations

import pytest

from learning.advice import MIN_LABELS, TableView, for_rejected, for_table, for_text
from learning.dialects import IndexInfo, ladder
from learning.records import ArmResult, Label

HNSW = IndexInfo("items_hnsw", "hnsw", m=8, ef_construction=32)
IVF = IndexInfo("items_ivf", "ivfflat", lists=100)


def view(*indexes: IndexInfo, **known: object) -> TableView:
    return TableView("public.items", "embedding", 10_000.0, indexes or (HNSW,), **known)  # type: ignore[arg-type]


def labels(results: dict[str, tuple[float, int]], k: int = 10, context: str = "") -> list[Label]:
    measured = {name: ArmResult(recall, rows, 1.0) for name, (recall, rows) in results.items()}
    return [Label("t", context or str(k), 0.0, None, k, k, measured, "as is", True)] * MIN_LABELS


def codes(*arguments: object) -> list[str]:
    return [advice.code for advice in for_table(*arguments)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("descending", "DESC disables the index"),
        ("no limit", "no LIMIT"),
        ("expression", "order by the distance itself"),
        ("no order by", "add ORDER BY"),
    ],
)
def test_statement_that_cannot_use_an_index_is_explained(reason: str, words: str) -> None:
    assert words in for_text(reason)[0].text


def test_what_is_nobodys_mistake_gets_no_advice() -> None:
    assert for_text(None) == for_text("cursor") == []
    assert for_rejected("public.items is a view", "public.items", "embedding", "<->") == []


def test_operator_that_does_not_match_the_opclass_is_told_which_would() -> None:
    reason = "no vector index on public.items (embedding) serves <=>; those there serve <->"
    (advice,) = for_rejected(reason, "public.items", "embedding", "<=>")
    assert advice.code == "operator-class"
    assert "CREATE INDEX ON public.items USING hnsw (embedding vector_cosine_ops)" in advice.text
    (missing,) = for_rejected("there is no vector index on public.items", "public.items", "embedding", "<->")
    assert missing.code == "no-index"


@pytest.mark.parametrize(
    ("kind", "operator", "opclass"),
    [("halfvec", "<=>", "halfvec_cosine_ops"), ("sparsevec", "<->", "sparsevec_l2_ops"), ("bit", "<~>", "bit_hamming_ops"),
     ("vector", "<#>", "vector_ip_ops"), ("embedding", "<->", "vector_l2_ops")],
)  # fmt: skip
def test_operator_class_is_that_of_the_columns_type(kind: str, operator: str, opclass: str) -> None:
    for reason in (
        f"there is no vector index on public.items (embedding {kind})",
        f"no vector index on public.items (embedding {kind}) serves {operator}; those there serve <+>",
    ):
        (advice,) = for_rejected(reason, "public.items", "embedding", operator)
        assert f"USING hnsw (embedding {opclass})" in advice.text


def test_limit_above_ef_search_is_named_with_both_numbers() -> None:
    (advice,) = for_table(view(), (), labels({"as is": (0.08, 40)}, 500), 0.98)
    assert advice.text.startswith("LIMIT 500 with ef_search 40 can return at most 40 rows")
    raised = view(usual={"hnsw.ef_search": "100"})
    assert "ef_search 100" in for_table(raised, (), labels({"as is": (0.2, 100)}, 500), 0.98)[0].text
    assert codes(view(), (), labels({"as is": (1.0, 500)}, 500), 0.98) == []


def test_rows_lost_to_a_filter_are_not_blamed_on_the_limit() -> None:
    found = labels({"as is": (0.2, 2)}, 10, "10\x1f3")
    (advice,) = for_table(view(), (), found, 0.98)
    assert advice.code == "too-few-rows"
    assert "2 of 10" in advice.text


def test_ivfflat_index_built_before_its_data_is_to_be_built_anew() -> None:
    arms = ladder([IVF], filtered=False, max_k=10)
    blind = {f"probes={n}": (n / 100, 10) for n in (6, 8, 11, 16, 23, 32)}
    found = for_table(view(IVF), arms, labels(blind), 0.98)
    assert [advice.code for advice in found] == ["reindex-ivfflat"]
    assert "REINDEX INDEX items_ivf" in found[0].text
    seeing = {name: (min(1.0, 6 * recall), 10) for name, (recall, _) in blind.items()}
    assert codes(view(IVF), arms, labels(seeing), 0.98) == []
    assert codes(view(IVF), arms, labels(blind)[:5], 0.98) == []  # too few to claim anything


def test_ivfflat_index_that_the_table_has_outgrown() -> None:
    grown = view(IVF, HNSW, rows_when_built={"items_ivf": 3000.0, "items_hnsw": 3000.0})
    assert codes(grown, (), [], 0.98) == ["outgrown-ivfflat"]
    assert codes(view(IVF, rows_when_built={"items_ivf": 9000.0}), (), [], 0.98) == []


def test_graph_that_misses_the_target_at_its_highest_effort() -> None:
    arms = ladder([HNSW], filtered=False, max_k=10)
    (advice,) = for_table(view(), arms, labels({"ef=1000": (0.93, 10)}), 0.98)
    assert advice.code == "weak-hnsw"
    assert "0.930" in advice.text
    assert "larger m (now 8)" in advice.text
    assert codes(view(), arms, labels({"ef=1000": (0.99, 10)}), 0.98) == []


def test_filter_column_without_an_index() -> None:
    (advice,) = for_table(view(unindexed=("category",), typical_share=0.01), (), [], 0.98)
    assert "CREATE INDEX ON public.items (category)" in advice.text
    assert codes(view(unindexed=("category",), typical_share=0.6), (), [], 0.98) == []  # most rows pass


def test_two_indexes_of_one_method() -> None:
    assert codes(view(HNSW, IndexInfo("other", "hnsw"), IVF), (), [], 0.98) == ["several-indexes"]
