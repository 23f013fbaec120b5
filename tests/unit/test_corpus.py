"""Statements pass byte for byte: those in the repository's own scripts, and thousands made of them.

`make corpus` does it with PostgreSQL's regression suite.
"""

from __future__ import annotations

from pathlib import Path

from tests.corpus.__main__ import run
from tests.corpus.passing import mutated, texts

SCRIPTS = sorted((Path(__file__).parents[1] / "conformance" / "psql").glob("*.sql"))


def test_scripts_are_cut_at_their_semicolons() -> None:
    script = b"SELECT ';'; -- ;\n\\set x ;\nDO $$ BEGIN; END $$; SELECT 'it''s;' /* ; */, \"a;b\";\nSELECT 1"
    assert [text.strip() for text in texts(script)] == [
        b"SELECT ';';",
        b"-- ;\n\nDO $$ BEGIN; END $$;",
        b"SELECT 'it''s;' /* ; */, \"a;b\";",
        b"SELECT 1",
    ]


def test_nothing_is_lost_in_the_cutting() -> None:
    for script in SCRIPTS:
        text = b"\n".join(line for line in script.read_bytes().split(b"\n") if not line.startswith(b"\\"))
        assert b"".join(b"".join(texts(script.read_bytes())).split()) == b"".join(text.split())


def test_statements_and_what_is_made_of_them_pass_as_they_are() -> None:
    passed, own, failed = run(SCRIPTS, 1500, 4)
    assert failed == []
    assert passed > 2500
    assert own > 10  # vector queries under the dictating policy: the check would see a change


def test_generated_texts_follow_from_the_seed() -> None:
    known = [b"SELECT 1;", b"SELECT 'a' = 'b'"]
    assert list(mutated(known, 20, 1)) == list(mutated(known, 20, 1)) != list(mutated(known, 20, 2))
