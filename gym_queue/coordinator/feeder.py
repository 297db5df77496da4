"""Publishes a run's examples, only so many at a time that a window of rollouts is open: the brake of the
whole road (G5).
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING

from gym_queue.coordinator.patience import patiently
from gym_queue.errors import UsageError
from gym_queue.ledger.base import fence_of
from gym_queue.records import Group, RunState
from gym_queue.telemetry.story import about

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from gym_queue.coordinator.archive import Archive
    from gym_queue.coordinator.source import Source
    from gym_queue.coordinator.window import Window
    from gym_queue.ledger.base import Ledger
    from gym_queue.pipeline import Publisher
    from gym_queue.records import Example, RunStatus, Ticket

_log = logging.getLogger(__name__)

_LARGEST_STEP = 256
"""Examples accepted in one step: the ledger runs a step without a pause, and others wait meanwhile."""

_LOWER_PRIORITY_SHARE = 8
"""A run keeps 1/8 of its window while one of higher priority is open, so that it neither delays that one nor
stops.
"""

_ROUNDING = 1e-6
"""Sums of weights are not exact: a third of 30 is 10."""

_PATIENCE = 1.0
"""Seconds between two looks at the ledger, should nobody say that there is room."""

_SOON = 0.05
"""Seconds between two looks for what nobody tells: new examples, new weights."""


class Feeder:
    """Feeds one run.

    The ledger says at each step where the run stands: which example comes next, and whether it is open. So a
    feeder that died is continued by the next one, a run that is paused is waited for, and a ledger that lost
    something (a Redis that crashed, a failover, a flush) is fed again from where it stands. Samples that the
    archive holds are left out.

    Args:
        ledger: where the run stands.
        publisher: where tickets go.
        run_id: the run.
        samples: rollouts of each example.
        source: the examples.
        archive: what is done.
        window: how many rollouts may be open.
        reopen: makes the run in the ledger again, from its beginning.
        allowed: how many examples may be begun, ``None``: all. It may grow at any time.

    Attributes:
        room_changed: set it when rollouts were archived.
        stopped: set it when nothing more is wanted.
        finished: nothing more will be accepted.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        publisher: Publisher,
        run_id: str,
        samples: int,
        source: Source,
        archive: Archive,
        window: Window,
        reopen: Callable[[], Awaitable[None]],
        allowed: Callable[[], Awaitable[int | None]] | None = None,
    ) -> None:
        self._ledger = ledger
        self._publisher = publisher
        self._run_id = run_id
        self._samples = samples
        self._source = source
        self._archive = archive
        self._window = window
        self._reopen = reopen
        self._allowed = allowed
        self._cursor = -1
        self._examples: Iterator[tuple[int, Example]] = iter(())
        self.room_changed = asyncio.Event()
        self.stopped = False
        self.finished = False

    async def run(self) -> None:
        """Feed, and see to it that what was fed is not forgotten, until ``stopped``."""
        while not self.stopped:
            self.room_changed.clear()
            runs = await patiently(self._ledger.runs)
            mine = next((run for run in runs if run.spec.run_id == self._run_id), None)
            if mine is not None and self._lacks_some(mine):
                await patiently(partial(self._ledger.forget_run, self._run_id))
                mine = None
            if mine is None:
                await self._reopen()
                continue
            room = await self._room(mine, runs)
            end = await self._end()
            if room and mine.cursor < end and not self.stopped:
                await self._feed(mine.cursor, end, room)
            else:
                await self._rest(end)
        self.finished = True

    async def _end(self) -> int:
        """Return the index before which examples may be begun now."""
        allowed = await self._allowed() if self._allowed else None
        return self._source.count if allowed is None else min(allowed, self._source.count)

    async def _rest(self, end: int) -> None:
        """Wait until somebody says that there is room, or there may be more to feed up to another ``end``,
        but not for long.
        """
        grows = self._allowed is not None or not self._source.closed
        looks = max(1, round(_PATIENCE / _SOON)) if grows else 1
        for _ in range(looks):
            try:
                async with asyncio.timeout(_PATIENCE / looks):
                    await self.room_changed.wait()
            except TimeoutError:
                if grows and await self._end() != end:
                    return
            else:
                return

    def _lacks_some(self, mine: RunStatus) -> bool:
        """Tell whether the archive lacks some of what the ledger thinks is archived."""
        fed = mine.state is RunState.OPEN and mine.open == 0
        return fed and self._archive.count < mine.cursor * self._samples

    async def _feed(self, cursor: int, end: int, room: int) -> None:
        """Let the ledger accept the examples from its cursor on, as many as there is room for."""
        if cursor != self._cursor:
            if 0 <= cursor < self._cursor:
                _log.warning(
                    "the ledger has lost examples %d to %d; it gets them again", cursor, self._cursor
                )
            self._examples = enumerate(self._source.examples(cursor), cursor)
        groups, reached = await asyncio.to_thread(self._next_groups, cursor, end, room)
        self._cursor = reached
        accept = partial(self._ledger.accept, self._run_id, cursor, reached, groups)
        tickets = await patiently(accept)
        if groups and not tickets:  # refused: the next look at the ledger says why
            self._cursor = -1
        if _log.isEnabledFor(logging.DEBUG):
            _say_accepted(tickets)
        await patiently(partial(self._publisher.publish, tickets))

    def _next_groups(self, cursor: int, end: int, room: int) -> tuple[list[Group], int]:
        """Take the next examples before ``end`` with samples left to do: at least one if there is one, no
        more than there is room for. Returns their groups, and the index of the example after them.
        """
        most = max(1, min(room // self._samples, _LARGEST_STEP))
        groups: list[Group] = []
        while cursor < end and len(groups) < most:
            index, example = self._next_example(cursor)
            cursor = index + 1
            if samples := self._left(index):
                groups.append(Group(example_index=index, samples=samples, example=example))
        return groups, cursor

    def _next_example(self, cursor: int) -> tuple[int, Example]:
        """Take one example. The source may have been shorter when it was asked for its examples."""
        found = next(self._examples, None)
        if found is None:
            self._examples = enumerate(self._source.examples(cursor), cursor)
            found = next(self._examples, None)
        if found is None:
            msg = f"the source has {self._source.count} examples, and brings only {cursor}"
            raise UsageError(msg)
        return found

    def _left(self, example_index: int) -> tuple[int, ...]:
        done = set(self._archive.done_samples(example_index))
        return tuple(sample for sample in range(self._samples) if sample not in done)

    async def _room(self, mine: RunStatus, runs: Sequence[RunStatus]) -> int:
        """Return how many rollouts may be opened now."""
        if mine.state is not RunState.OPEN:
            return 0
        room = await self._share(mine, runs) - mine.open
        return max(room, self._samples) if room >= self._samples or mine.open == 0 else 0

    async def _share(self, mine: RunStatus, runs: Sequence[RunStatus]) -> int:
        """Return this run's part of the window: all of it alone, by its weight among its peers, little under
        a higher one.
        """
        window = await self._window.size()
        rivals = [run for run in runs if run.state is RunState.OPEN and (run.open or run is mine)]
        if any(run.spec.priority > mine.spec.priority for run in rivals):
            return max(1, window // _LOWER_PRIORITY_SHARE)
        peers = (run.spec.weight for run in rivals if run.spec.priority == mine.spec.priority)
        return max(1, int(window * mine.spec.weight / sum(peers) + _ROUNDING))


def _say_accepted(tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        for sample in ticket.samples:
            with about(fence_of(ticket, sample, worker="")):
                _log.debug("accepted")
