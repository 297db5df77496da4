"""Rollouts of mixed length and behaviour, and how each of them must end."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gym_queue.records import FailureClass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

Ending = tuple[str, FailureClass | None]
SUCCEEDED: Ending = ("succeeded", None)
CANCELLED: Ending = ("cancelled", None)


def _failed(failure_class: FailureClass) -> Ending:
    return ("failed", failure_class)


def long_tail(dice: random.Random, scale: float) -> float:
    """Return seconds between 10 ms and 2 s: most are short, some take many times as long."""
    return min(2.0, max(0.01, scale * dice.lognormvariate(0.0, 0.8)))


@dataclass(frozen=True)
class Kind:
    """One behaviour: how its rollouts end whatever dies, and the row that asks ``world.World`` for it."""

    ending: Ending
    row: Mapping[str, Any] = field(default_factory=dict)
    drawn: Callable[[random.Random], Mapping[str, Any]] = field(default=lambda _dice: {})


KINDS: dict[str, Kind] = {
    "instant": Kind(SUCCEEDED),
    "sleeps": Kind(SUCCEEDED, drawn=lambda dice: {"sleep": long_tail(dice, 0.35)}),
    "queued": Kind(SUCCEEDED, {"queued": True}, lambda dice: {"sleep": long_tail(dice, 0.2)}),
    "turns": Kind(
        SUCCEEDED,
        {"queued": True},
        lambda dice: {"turns": dice.randint(2, 6), "tool": dice.uniform(0.01, 0.2)},
    ),
    "large": Kind(SUCCEEDED, {"turns": 3, "bytes": 200_000}, lambda dice: {"queued": dice.random() < 0.5}),
    "raises": Kind(_failed(FailureClass.ENVIRONMENT), {"generating": "raises"}),
    "hangs": Kind(_failed(FailureClass.TIMEOUT), {"generating": "hangs"}),
    "unverifiable": Kind(
        _failed(FailureClass.VERIFIER), {"verifying": "raises"}, lambda dice: {"queued": dice.random() < 0.5}
    ),
    "hung verifier": Kind(_failed(FailureClass.TIMEOUT), {"verifying": "hangs", "queued": True}),
    "deadly verifier": Kind(_failed(FailureClass.INFRASTRUCTURE), {"verifying": "exits", "queued": True}),
    "poison": Kind(
        _failed(FailureClass.INFRASTRUCTURE),
        drawn=lambda dice: {
            "generating": dice.choice(["exits", "segfaults"]),
            "sleep": dice.uniform(0.0, 0.2),
        },
    ),
    "gated": Kind(SUCCEEDED, {"gate": "gate"}),
    "gated last": Kind(SUCCEEDED, {"gate": "last"}),
}

MIXED = {
    "instant": 20,
    "queued": 20,
    "turns": 10,
    "large": 5,
    "raises": 5,
    "hangs": 4,
    "unverifiable": 5,
    "hung verifier": 1,
    "deadly verifier": 1,
}
"""Shares of a mixed run in percent; the rest sleep."""


@dataclass(frozen=True)
class Workload:
    """The input of a run. ``kinds`` names the behaviour of each row."""

    rows: tuple[dict[str, Any], ...]
    kinds: tuple[str, ...]
    samples: int

    @property
    def total(self) -> int:
        """Rollouts."""
        return len(self.rows) * self.samples

    def ending(self, example_index: int) -> Ending:
        """Return how the rollouts of a row must end."""
        return KINDS[self.kinds[example_index]].ending

    def write(self, path: Path) -> None:
        """Write the rows as JSONL."""
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))


def draw(seed: int, counts: Mapping[str, int], samples: int = 1, *, first: Sequence[str] = ()) -> Workload:
    """Draw so many rows of each kind, in any order but for the kinds that come ``first``.

    The same arguments give the same rows in the same order.
    """
    dice = random.Random(seed)
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    dice.shuffle(kinds)
    kinds.sort(key=lambda kind: kind not in first)
    rows = tuple(
        {**KINDS[kind].row, **KINDS[kind].drawn(dice), "reward": dice.randint(0, 8) / 8} for kind in kinds
    )
    return Workload(rows, tuple(kinds), samples)


def mixed(seed: int, rows: int, samples: int = 1, shares: Mapping[str, int] = MIXED) -> Workload:
    """Draw rows of all kinds by their shares, one at least.

    What hangs or is tried often comes first: it takes longest, and would be all that is left at the end.
    """
    counts = {kind: max(1, rows * share // 100) for kind, share in shares.items()}
    counts["sleeps"] = rows - sum(counts.values())
    return draw(seed, counts, samples, first=("hangs", "hung verifier", "deadly verifier"))
