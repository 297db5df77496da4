"""What a run of the head has beside its rows: groups for a trainer, and a file that says how far it is."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING

from gym_queue.api import GroupCounts
from gym_queue.coordinator.allowance import versions_missing
from gym_queue.coordinator.patience import patiently
from gym_queue.coordinator.progress import Written
from gym_queue.errors import DiskFullError
from gym_queue.records import RunState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from gym_queue.coordinator.archive import Archive
    from gym_queue.coordinator.groups import Groups
    from gym_queue.coordinator.metrics import Metrics
    from gym_queue.coordinator.progress import ProgressFile
    from gym_queue.coordinator.source import Source
    from gym_queue.ledger.base import Event, Ledger
    from gym_queue.records import RunSpec, RunStatus

_AGAIN = 0.5
"""Seconds after which samples that were not wanted, and have no row yet, are ended again: the ledger may have
forgotten that they were.
"""


class Delivery:
    """Delivers one run. Without ``groups`` and ``progress``, as for a plain ``submit-rollouts``, it does
    nothing.

    Args:
        ledger: knows the newest weights.
        spec: the run.
        source: the examples.
        archive: what is done.
        metrics: of what the archive holds.
        groups: decides groups, open.
        progress: says how far the run is.
        cancel_samples: ends the open samples of examples, given with the reasons.

    Attributes:
        decides: whether it decides groups.
        reports: whether it says how far the run is.
        status: how the run stands in the ledger, as far as is known.
        final: how the run ended, once nothing more will come.
        enough: set when as many groups are complete as are wanted.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        spec: RunSpec,
        source: Source,
        archive: Archive,
        metrics: Metrics,
        groups: Groups | None,
        progress: ProgressFile | None,
        cancel_samples: Callable[[Mapping[int, str]], Awaitable[object]] | None,
    ) -> None:
        if groups is not None and cancel_samples is None:
            msg = "groups cannot be decided early without a way to end their stragglers"
            raise ValueError(msg)
        self._ledger = ledger
        self._spec = spec
        self._source = source
        self._archive = archive
        self._metrics = metrics
        self._groups = groups
        self._progress = progress
        self._cancel_samples = cancel_samples
        self._freshness = spec.freshness if groups else None
        self._decided = asyncio.Event()
        self.decides = groups is not None
        self.reports = progress is not None
        self.status: RunStatus | None = None
        self.final: RunState | None = None
        self.enough = asyncio.Event()

    async def begin(self) -> None:
        """Decide what an earlier coordinator could not; to be ``stored`` next, before anything is fed."""
        await self.look()
        if self._groups is not None:
            await asyncio.to_thread(self._groups.settle)

    async def look(self) -> None:
        """Take note of the newest weights, where their age matters."""
        if self._groups is not None and self._freshness:
            weights = await patiently(partial(self._ledger.weights, self._spec.model))
            self._groups.version = max(self._groups.version, weights.version if weights else 0)

    async def allowed(self) -> int | None:
        """Return how many examples may be begun, ``None``: all."""
        if self._groups is None:
            return None
        await self.look()
        return self._groups.allowance()

    async def stored(self, events: Sequence[Event]) -> None:
        """Decide groups with ended samples that the archive has just stored, durably, and say how far the run
        is.

        Raises:
            StorageError: a file cannot be written. To be called again without the events.
        """
        if self._groups is not None:
            self._groups.add(events)
        if self._groups is not None or self._progress is not None:
            await asyncio.to_thread(self._store)
        if self._groups is not None and self._groups.enough:
            self.enough.set()
        self._decided.set()

    def note(self) -> None:
        """Say how the run stands, if that has changed. A full disk is left to the next batch, which waits."""
        if self._progress is not None:
            try:
                self._progress.write(self._written)
            except DiskFullError:
                return

    async def trim(self) -> None:
        """End samples that nobody wants any more because their groups are decided, as long as the run goes
        on.
        """
        again, told = 0.0, set[int]()
        while self._groups is not None and self._cancel_samples is not None:
            self._decided.clear()
            if time.monotonic() >= again:
                again = time.monotonic() + _AGAIN
                told.clear()
            unwanted = {
                index: reason for index, reason in self._groups.stragglers.items() if index not in told
            }
            if unwanted:
                await patiently(partial(self._cancel_samples, unwanted))
                told |= unwanted.keys()
            try:
                async with asyncio.timeout(_AGAIN):
                    await self._decided.wait()
            except TimeoutError:
                continue

    async def end_open(self, limit: int) -> None:
        """End open samples because there are groups enough: those of about ``limit`` rollouts."""
        rollouts = await patiently(partial(self._ledger.open_rollouts, self._spec.run_id, limit))
        reasons = {rollout.example_index: "the run has all the groups it wanted" for rollout in rollouts}
        if self._cancel_samples is not None:
            await patiently(partial(self._cancel_samples, reasons))

    def _store(self) -> None:
        if self._groups is not None:
            self._groups.store()
        if self._progress is not None:
            self._progress.write(self._written)

    def _written(self) -> Written:
        rows, failures = self._archive.lengths
        status = self.status
        paused = status is not None and status.state is RunState.PAUSED
        return Written(
            rows=rows,
            failures=failures,
            groups=self._groups.length if self._groups else 0,
            rollouts=self._metrics.counts(
                self._archive.count if self.final else status.accepted if status else None
            ),
            decided=self._groups.counts if self._groups else GroupCounts(),
            reward_mean=self._metrics.mean_reward,
            state=self.final or (RunState.PAUSED if paused else RunState.OPEN),
            waiting_for=None if self.final else self._waiting_for(),
            examples=self._source.count,
        )

    def _waiting_for(self) -> str | None:
        """Say which weights the run waits for before it begins another group."""
        groups, begun = self._groups, self.status.cursor if self.status else 0
        if groups is None or self._freshness is None or groups.enough or begun >= self._source.count:
            return None
        missing = versions_missing(self._freshness, groups.counts, groups.versions, begun)
        if not missing:
            return None
        return (
            f"version {groups.version + missing} of the weights: with version {groups.version}, "
            f"a group more than the {begun} that were begun would be too old when its turn comes"
        )
