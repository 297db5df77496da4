"""Publishes a run's examples, only so many at a time that a window of rollouts is open: the brake of the
whole road (G5).
"""

from __future__ import annotations

import asyncio
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from gym_queue.coordinator.patience import patiently
from gym_queue.records import Group, RunState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gym_queue.coordinator.source import Source
    from gym_queue.ledger.base import Ledger
    from gym_queue.pipeline import Publisher
    from gym_queue.records import Example, RunStatus

_LARGEST_STEP = 256
"""Examples accepted in one step: the ledger runs a step without a pause, and others wait meanwhile."""

_LOWER_PRIORITY_SHARE = 8
"""A run keeps 1/8 of its window while one of higher priority is open, so that it neither delays that one nor
stops.
"""

_PATIENCE = 1.0
"""Seconds between two looks at the room, should nobody say that there is some."""


class Feeder:
    """Feeds one run.

    The ledger's cursor says which example comes next, so a feeder that died is continued by the next one.
    Samples that the archive holds already (``done``: example index -> sample indices) are left out.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        publisher: Publisher,
        run: RunStatus,
        source: Source,
        done: Callable[[int], Sequence[int]],
        window: int,
    ) -> None:
        self._ledger = ledger
        self._publisher = publisher
        self._run_id = run.spec.run_id
        self._samples = run.spec.samples
        self._cursor = run.cursor
        self._source = source
        self._done = done
        self._window = window
        self.room_changed = asyncio.Event()

    async def run(self) -> None:
        """Feed until the source is empty or the run is no longer open."""
        examples = enumerate(self._source.examples(self._cursor), self._cursor)
        while self._cursor < self._source.count:
            room = await self._wait_for_room()
            if room == 0:
                return
            groups = await asyncio.to_thread(self._next_groups, examples, room)
            next_cursor = groups[-1].example_index + 1 if groups else self._source.count
            accept = partial(self._ledger.accept, self._run_id, self._cursor, next_cursor, groups)
            tickets = await patiently(accept)
            if groups and not tickets:  # paused or cancelled meanwhile
                return
            self._cursor = next_cursor
            await patiently(partial(self._publisher.publish, tickets))

    def _next_groups(self, examples: Iterator[tuple[int, Example]], room: int) -> list[Group]:
        """Take the next examples with samples left to do: at least one, no more than there is room for."""
        groups: list[Group] = []
        most = max(1, min(room // self._samples, _LARGEST_STEP))
        wanted = (
            Group(example_index=index, samples=samples, example=example)
            for index, example in examples
            if (samples := self._left(index))
        )
        groups.extend(islice(wanted, most))
        return groups

    def _left(self, example_index: int) -> tuple[int, ...]:
        done = set(self._done(example_index))
        return tuple(sample for sample in range(self._samples) if sample not in done)

    async def _wait_for_room(self) -> int:
        """Return how many rollouts may be opened; 0 when the run is no longer open."""
        while True:
            self.room_changed.clear()
            runs = await patiently(self._ledger.runs)
            mine = next((run for run in runs if run.spec.run_id == self._run_id), None)
            if mine is None or mine.state is not RunState.OPEN:
                return 0
            room = self._share(mine, runs) - mine.open
            if room >= self._samples or mine.open == 0:
                return max(room, self._samples)
            try:
                await asyncio.wait_for(self.room_changed.wait(), _PATIENCE)
            except TimeoutError:
                continue

    def _share(self, mine: RunStatus, runs: Sequence[RunStatus]) -> int:
        """Return this run's part of the window: all of it alone, an equal part among its peers, little under
        a higher one.
        """
        rivals = [run for run in runs if run.state is RunState.OPEN and (run.open or run is mine)]
        if any(run.spec.priority > mine.spec.priority for run in rivals):
            return max(1, self._window // _LOWER_PRIORITY_SHARE)
        peers = sum(run.spec.priority == mine.spec.priority for run in rivals)
        return self._window // max(1, peers)
