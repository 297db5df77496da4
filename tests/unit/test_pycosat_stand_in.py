"""compat/pycosat answers as pycosat does: against brute force, and against puzzles that the original made."""

from __future__ import annotations

import hashlib
import itertools
import json
from importlib.metadata import version
from typing import TYPE_CHECKING

import pycosat
import pytest
import reasoning_gym
from hypothesis import given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Sequence

VARIABLES = 4
LITERALS = st.integers(-VARIABLES, VARIABLES).filter(bool)
FORMULAS = st.lists(st.lists(LITERALS, max_size=3), max_size=12)


def solutions(clauses: Sequence[Sequence[int]], variables: int) -> set[tuple[int, ...]]:
    """Try every assignment."""
    assignments = itertools.product(*((-v, v) for v in range(1, variables + 1)))
    return {a for a in assignments if all(any(literal in a for literal in clause) for clause in clauses)}


def test_the_stand_in_is_what_is_installed() -> None:
    assert version("pycosat") == "0.6.6+python.sat"


@settings(deadline=None)  # a busy machine is not a wrong answer
@given(FORMULAS)
def test_every_solution_comes_once(clauses: list[list[int]]) -> None:
    found = [tuple(solution) for solution in pycosat.itersolve(clauses, vars=VARIABLES)]
    assert len(found) == len(set(found))
    assert set(found) == solutions(clauses, VARIABLES)


@settings(deadline=None)  # a busy machine is not a wrong answer
@given(FORMULAS)
def test_one_solution_or_the_word_unsat(clauses: list[list[int]]) -> None:
    mentioned = max((abs(literal) for clause in clauses for literal in clause), default=0)
    answer = pycosat.solve(clauses)
    possible = solutions(clauses, mentioned)
    assert answer == "UNSAT" if not possible else tuple(answer) in possible


# Digests of what reasoning_gym 0.1.25 made with the original pycosat 0.6.6 (seed 7, five puzzles each).
@pytest.mark.parametrize(
    ("people", "characteristics", "digest"),
    [(2, 3, "57656e6855f2ec07"), (4, 4, "0dc05f01b8922a30"), (5, 5, "9ba5c180f88d7513")],
)
def test_zebra_puzzles_are_those_of_the_original(people: int, characteristics: int, digest: str) -> None:
    dataset = reasoning_gym.create_dataset(
        "zebra_puzzles", seed=7, size=5, num_people=people, num_characteristics=characteristics
    )
    puzzles = json.dumps([dataset[index] for index in range(5)])
    assert hashlib.sha256(puzzles.encode()).hexdigest()[:16] == digest
