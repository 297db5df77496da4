"""Slow samples: a group that needs not wait for all of its own ends early, and so does the run."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from gym_queue.coordinator.feed import Feed
from tests.unit.players import Players, Referee
from tests.unit.small_stack import Output, Stack

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gym_queue.engines.base import Completion
    from gym_queue.records import Message

SAMPLES, GROUPS, USABLE = 8, 64, 6
WINDOW = 64
SECONDS, TIMES_AS_LONG = 0.1, 30


class Slow(Players):
    """One sample in twenty takes thirty times as long."""

    def __init__(self) -> None:
        super().__init__()
        self.slow: set[int] = set(range(7, SAMPLES * GROUPS, 20))

    async def generate(self, messages: Sequence[Message], **options: Any) -> Completion:
        slow = options["seed"] in self.slow
        self.act = lambda: asyncio.sleep(SECONDS * (TIMES_AS_LONG if slow else 1))
        return await super().generate(messages, **options)


async def collect(folder: Path, **policy: Any) -> tuple[float, Slow]:
    """Run; return how many seconds that took, and the engine."""
    engine = Slow()
    stack = Stack(engine=engine, world=Referee(lambda ordinal: ordinal % 2))
    output = Output(folder, delivers=True, samples=SAMPLES, sampling={"seed": 0}, groups=policy)
    started = time.monotonic()
    async with stack.up(), output.coordinator(stack, GROUPS, window=WINDOW) as coordinator:
        await coordinator.run()
    assert len(Feed(output.out).groups("", limit=1000).items) == GROUPS
    return time.monotonic() - started, engine


async def test_a_run_that_does_not_wait_for_stragglers_takes_less_than_half_as_long(tmp_path: Path) -> None:
    all_of_them, patient = await collect(tmp_path / "all")
    enough, hurried = await collect(tmp_path / "enough", usable=USABLE)
    assert patient.stopped == []
    assert hurried.slow <= set(hurried.stopped), "their requests are stopped"
    assert 2 * enough < all_of_them, (enough, all_of_them)
