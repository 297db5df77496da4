"""A run that delivers groups of four, in a whole stack in one event loop, and what its readers see."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gym_queue.api import GroupRow
from gym_queue.coordinator.feed import Feed
from gym_queue.records import Sampling
from gym_queue.testing import async_wait_until
from tests.unit.players import Players, Referee
from tests.unit.small_stack import Output, Stack

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gym_queue.coordinator.progress import Written
    from gym_queue.ledger.base import Ledger
    from tests.unit.small_stack import Examples

SAMPLES = 4


class Scene:
    """A run of groups of four, with all that it needs."""

    def __init__(
        self,
        folder: Path,
        *,
        ledger: Ledger | None = None,
        engine: Players | None = None,
        reward: Callable[[int], float] = lambda ordinal: ordinal % 2,
        **spec: Any,
    ) -> None:
        self.engine = engine or Players()
        self.stack = Stack(ledger=ledger, engine=self.engine, world=Referee(reward))
        self.output = Output(folder, delivers=True, samples=SAMPLES, sampling=Sampling(seed=0), **spec)
        self.feed = Feed(self.output.out)

    async def run(self, examples: int | Examples, **options: Any) -> None:
        """Run to the end."""
        async with self.stack.up(), self.output.coordinator(self.stack, examples, **options) as coordinator:
            await coordinator.run()

    def groups(self, *, dropped: bool = False) -> list[GroupRow]:
        page = self.feed.groups("", limit=1000, dropped=dropped)
        return [GroupRow.model_validate_json(item.data) for item in page.items]

    async def has_groups(self, count: int) -> None:
        """Wait until so many groups are complete."""
        await async_wait_until(lambda: len(self.groups()) == count, what=f"{count} groups")

    def rows(self) -> dict[tuple[int, int], dict[str, Any]]:
        """Return all rows; each rollout must have one."""
        rows = [json.loads(item.data) for item in self.feed.rollouts("", limit=100_000).items]
        found = {(row["example_index"], row["sample_index"]): row for row in rows}
        assert len(found) == len(rows)
        return found

    def written(self) -> Written:
        return self.feed.written()
