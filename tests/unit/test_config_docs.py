"""The reference, the sample file and the schema say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from config import docs
from config.loader import known_keys, load, sections, variable
from config.schema import Config, Table


def test_the_reference_in_the_repository_is_up_to_date() -> None:
    assert docs.REFERENCE.read_text(encoding="utf-8") == docs.reference(), "run: python -m config.docs"


def test_the_sample_in_the_repository_is_up_to_date() -> None:
    assert docs.SAMPLE.read_text(encoding="utf-8") == docs.sample(), "run: python -m config.docs"


@pytest.mark.parametrize("key", known_keys())
def test_the_reference_describes_every_key(key: str) -> None:
    text = docs.REFERENCE.read_text(encoding="utf-8")
    (entry,) = re.findall(rf"^### {re.escape(key)}\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert re.search(r"^Type: .+ Default: .+ Environment: ", entry, re.MULTILINE)
    assert f"`{variable(key)}`" in entry
    assert re.search(r"^Downside: \S", entry, re.MULTILINE)


@pytest.mark.parametrize("key", Table.model_fields)
def test_the_reference_describes_every_option_of_a_table(key: str) -> None:
    assert f"### {key}\n" in docs.REFERENCE.read_text(encoding="utf-8")


@pytest.mark.parametrize("section", [*sections().values(), Table])
def test_every_option_has_a_description_and_a_downside(section: type[Table]) -> None:
    for shape in section.model_json_schema()["properties"].values():
        assert shape["description"].rstrip().endswith(".")
        assert shape["downside"].endswith(".")


def test_the_sample_as_it_stands_is_the_default_configuration() -> None:
    defaults = load(None, {})
    assert load(docs.SAMPLE, {}).model_copy(update={"store": defaults.store}) == defaults


def test_the_sample_with_every_option_switched_on_still_holds_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "proxy.toml"
    path.write_text(re.sub(r"^#(?=\S)", "", docs.SAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    config = load(path, {})
    defaults = Config()
    assert config.learner.dsn is not None
    assert config.learner.dsn.get_secret_value() == docs.EXAMPLES["learner.dsn"]
    assert config.store.path == tmp_path / defaults.store.path
    assert config.table("public.items") == defaults.table("public.items")
    assert config.model_fields_set == set(Config.model_fields)
    for name, section in sections().items():
        given = getattr(config, name)
        assert given.model_fields_set == set(section.model_fields)
        for key in section.model_fields:
            if f"{name}.{key}" not in {*docs.EXAMPLES, "store.path"}:
                assert getattr(given, key) == getattr(getattr(defaults, name), key)
