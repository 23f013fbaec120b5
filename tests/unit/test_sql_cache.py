"""The generation cache keeps what is used and stays within its bounds."""

from __future__ import annotations

from proxy.sql.cache import GenerationCache


def test_what_is_used_survives_any_number_of_others() -> None:
    cache: GenerationCache[int, str] = GenerationCache(10, 1000)
    cache.put(-1, "kept", 1)
    for i in range(100):
        cache.put(i, "other", 1)
        assert cache.get(-1) == "kept"
    assert cache.get(0) is None
    assert cache.get(99) == "other"


def test_neither_bound_is_exceeded() -> None:
    few: GenerationCache[int, int] = GenerationCache(10, 1000)
    light: GenerationCache[int, int] = GenerationCache(1000, 100)
    for i in range(100):
        few.put(i, i, 1)
        light.put(i, i, 9)
        assert len(few) <= 10
        assert len(light) * 9 <= 100
        assert light.weight <= 50


def test_what_is_too_heavy_is_not_kept() -> None:
    cache: GenerationCache[int, int] = GenerationCache(10, 100)
    cache.put(1, 1, 51)
    assert cache.get(1) is None
    assert len(cache) == 0


def test_replacing_an_entry_counts_it_once() -> None:
    cache: GenerationCache[int, int] = GenerationCache(10, 100)
    for i in range(50):
        cache.put(1, i, 20)
    assert (cache.get(1), cache.weight, len(cache)) == (49, 20, 1)
