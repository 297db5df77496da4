"""A mix of environments: the shares are those of the weights, at any moment, and the same each time."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING

import pytest

from gym_queue.api import MixPart
from gym_queue.coordinator.mix import MixSource
from gym_queue.errors import UsageError, unknown_name
from tests.unit.test_source import _Counted

if TYPE_CHECKING:
    from gym_queue.environments.base import Environment


def environments(name: str) -> Environment:
    if name not in {"a", "b", "c"}:
        raise unknown_name(name, "abc", kind="environment")
    return _Counted(brings=100)


def mix(*parts: tuple[str, int, float], seed: int = 0) -> MixSource:
    named = [MixPart(name=name, size=size, weight=weight, seed=seed) for name, size, weight in parts]
    return MixSource(named, environments)


def turns(source: MixSource) -> str:
    return "".join(example.environment for example in source.examples(0))


def test_parts_take_turns_smoothly_and_the_rest_goes_on_when_one_is_used_up() -> None:
    assert turns(mix(("a", 4, 2.0), ("b", 4, 1.0))) == "abaabab" + "b"
    assert turns(mix(("a", 2, 1.0), ("b", 3, 1.0), ("c", 1, 1.0))) == "abcabb"


def test_at_any_moment_each_has_about_its_share() -> None:
    source = mix(("a", 100, 0.5), ("b", 100, 0.3), ("c", 100, 0.2))
    seen: Counter[str] = Counter()
    for index, example in enumerate(islice(source.examples(0), 150), 1):
        seen[example.environment] += 1
        for name, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)):
            assert abs(seen[name] - share * index) <= 1.0 + 1e-9


def test_it_is_the_same_from_any_start() -> None:
    source = mix(("a", 7, 0.7), ("b", 5, 0.1), ("c", 3, 0.4))
    whole = list(source.examples(0))
    assert (source.count, source.closed, len(whole)) == (15, True, 15)
    for start in range(16):
        assert list(source.examples(start)) == whole[start:]


def test_ids_are_unique_and_plain_where_there_is_one_part() -> None:
    assert [example.id for example in mix(("a", 2, 1.0), seed=3).examples(0)] == ["3-0", "3-1"]
    ids = [example.id for example in mix(("a", 2, 1.0), ("a", 2, 1.0)).examples(0)]
    assert ids == ["0-0-0", "1-0-0", "0-0-1", "1-0-1"]


def test_the_fingerprint_follows_every_part() -> None:
    def fingerprint(size: int = 3, weight: float = 1.0, seed: int = 0) -> str:
        return mix(("a", size, weight), ("b", 3, 1.0), seed=seed).fingerprint

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(size=4), fingerprint(weight=2.0), fingerprint(seed=1)}) == 4


def test_a_part_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(UsageError, match="there is no environment 'd'"):
        mix(("a", 1, 1.0), ("d", 1, 1.0))
    with pytest.raises(UsageError, match="was asked for 101 examples and brought only 100"):
        list(mix(("a", 101, 1.0)).examples(0))
