"""pycosat's two functions, answered by MiniSat from ``python-sat``, which comes as a wheel.

The set of solutions of a formula is the same whatever solver finds it; their order may differ from the
original's. reasoning_gym's zebra puzzles only ask whether a solution is unique, so they come out the same; a
test holds that. The original's ``verbose`` and ``prop_limit`` are not offered: nobody here uses them, and a
``TypeError`` says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pysat.solvers import Minisat22

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def itersolve(clauses: Iterable[Iterable[int]], vars: int = -1) -> Iterator[list[int]]:  # noqa: A002  (pycosat's name)
    """Yield every solution once.

    Args:
        clauses: the formula in conjunctive normal form; a literal is a variable's number (from 1), negative
            for "not".
        vars: number of variables, where there are more than the clauses mention.

    Yields:
        One literal for each variable, in ascending order of the variables.
    """
    bootstrap = [list(clause) for clause in clauses]
    variables = max([vars, *(abs(literal) for clause in bootstrap for literal in clause)])
    # A clause that is always true makes the solver decide a variable that no other clause mentions.
    bootstrap += [[variable, -variable] for variable in range(1, variables + 1)]
    with Minisat22(bootstrap_with=bootstrap) as solver:
        yield from solver.enum_models()


def solve(clauses: Iterable[Iterable[int]], vars: int = -1) -> list[int] | str:  # noqa: A002  (pycosat's name)
    """Return one solution as ``itersolve`` gives it, or the string ``"UNSAT"`` if there is none."""
    return next(itersolve(clauses, vars), "UNSAT")
