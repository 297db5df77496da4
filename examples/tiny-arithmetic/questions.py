"""The questions the tiny model is trained and measured on, and which of them are held out."""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING, Any

import reasoning_gym

if TYPE_CHECKING:
    from collections.abc import Iterator

DATASET = "chain_sum"
CONFIG = {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2}

# reasoning_gym draws example i of seed s from the random state s + i, so near-by seeds share examples.
# Each training stream therefore gets a range of this length to itself, and the range that starts at 0 is
# left to evaluation.
SEED_RANGE = 1_000_000_000
HELD_OUT_ONE_IN = 8


def is_held_out(question: str) -> bool:
    """Whether the question is kept out of training, decided by a hash of its text alone.

    Two seeds can produce the same question (there are only 200 sums of two one-digit numbers), so keeping the
    seeds apart would not keep the questions apart.
    """
    return hashlib.sha256(question.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def make_dataset(seed: int, size: int, **changes: int) -> Any:
    """Return the reasoning_gym dataset with this project's configuration, or with a few values changed."""
    return reasoning_gym.create_dataset(DATASET, seed=seed, size=size, **{**CONFIG, **changes})


def training_entries(seed: int, easy_count: int) -> Iterator[dict[str, Any]]:
    """Yield reasoning_gym entries without end, leaving out every held-out question.

    The first `easy_count` entries follow `CONFIG`. After that every second entry has numbers of three digits
    and the others have one to three. The model hardly learns three digits, which leaves it good but not
    perfect at two. (How it would do after as many steps on `CONFIG` alone was not measured.)
    """
    easy, mixed, hard = (
        _training_stream(make_dataset(number * SEED_RANGE + seed, size=SEED_RANGE, **changes))
        for number, changes in enumerate(({}, {"max_digits": 3}, {"min_digits": 3, "max_digits": 3}), start=1)
    )
    yield from itertools.islice(easy, easy_count)
    for pair in zip(mixed, hard, strict=False):
        yield from pair


def _training_stream(dataset: Any) -> Iterator[dict[str, Any]]:
    """Yield the entries of the dataset whose question is not held out."""
    return (entry for entry in iter_entries(dataset) if not is_held_out(entry["question"]))


def held_out_entries(dataset: Any, count: int) -> list[dict[str, Any]]:
    """Return the first `count` entries of the dataset whose question was never trained on."""
    kept = []
    for entry in iter_entries(dataset):
        if is_held_out(entry["question"]):
            kept.append(entry)
            if len(kept) == count:
                break
    return kept


def iter_entries(dataset: Any) -> Iterator[dict[str, Any]]:
    """Yield the entries in order, one at a time."""
    return (dataset[index] for index in range(len(dataset)))
