"""One run from its first example to its last row: feeder and aggregator side by side."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING

from gym_queue.coordinator.aggregator import Aggregator
from gym_queue.coordinator.feeder import Feeder
from gym_queue.coordinator.patience import patiently
from gym_queue.errors import GymQueueError, LedgerError
from gym_queue.records import Record, RunState, Stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from gym_queue.coordinator.archive import Archive
    from gym_queue.coordinator.metrics import Metrics, RunMetrics
    from gym_queue.coordinator.source import Source
    from gym_queue.ledger.base import Ledger
    from gym_queue.pipeline import Publisher
    from gym_queue.records import RunSpec, RunStatus, Ticket

_DUE_INTERVAL = 0.5
_LARGEST_BATCH = 1000


class Interrupted(GymQueueError):  # noqa: N818 - an event, not a mistake
    """The run was interrupted; what had ended is in the archive."""


class Progress(Record):
    """Where a run stands, in rollouts. ``in_flight`` are those begun by a worker."""

    total: int
    succeeded: int
    failed: int
    cancelled: int
    in_flight: int
    reward_mean: float | None


class Coordinator:
    """Drives one run.

    Args:
        ledger: where rollouts stand.
        publisher: where tickets go.
        spec: the run; its id is its idempotency key, so a coordinator that died is continued by the next one.
        source: the examples.
        archive: where rows go, open; what it holds already is not done again.
        metrics: what the archive holds already has been added.
        window: how many rollouts may be open at once.
        on_progress: called after each batch of ended rollouts, and every half second.
        grace: seconds that rollouts in flight may go on after ``interrupt``.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        publisher: Publisher,
        spec: RunSpec,
        source: Source,
        archive: Archive,
        metrics: Metrics,
        window: int,
        on_progress: Callable[[Progress], None],
        grace: float = 10.0,
    ) -> None:
        self._ledger = ledger
        self._publisher = publisher
        self._spec = spec
        self._source = source
        self._archive = archive
        self._metrics = metrics
        self._window = window
        self._on_progress = on_progress
        self._grace = grace
        self._interrupted = asyncio.Event()
        self._in_flight = 0
        self._total = source.count * spec.samples

    def interrupt(self) -> None:
        """Stop pulling; ``run`` raises ``Interrupted`` once what is in flight has ended or the grace period
        is over.
        """
        self._interrupted.set()

    async def run(self) -> RunMetrics:
        """Run to the end and return the metrics.

        Raises:
            Interrupted: ``interrupt`` was called.
            StorageError: the archive cannot be written. The ledger keeps what was not archived.
        """
        run_id = self._spec.run_id
        status = await patiently(self._open)
        feeder = Feeder(
            ledger=self._ledger,
            publisher=self._publisher,
            run=status,
            source=self._source,
            done=self._archive.done_samples,
            window=self._window,
        )

        def batch_done() -> None:
            feeder.room_changed.set()
            self._on_progress(self._progress())

        aggregator = Aggregator(
            ledger=self._ledger,
            run_id=run_id,
            archive=self._archive,
            metrics=self._metrics,
            total=self._total,
            on_batch=batch_done,
        )
        parts = [asyncio.create_task(part) for part in (feeder.run(), self._watch())]
        end = asyncio.create_task(aggregator.run())
        stop = asyncio.create_task(self._interrupted.wait())
        try:
            await self._first_end(end, stop, parts)
            if not end.done():
                await self._wind_down(end)
        finally:
            for task in (*parts, end, stop):
                task.cancel()
            await asyncio.gather(*parts, end, stop, return_exceptions=True)
        await patiently(partial(self._ledger.set_run_state, run_id, RunState.ENDED))
        await patiently(partial(self._ledger.forget_run, run_id))
        return self._metrics.snapshot(accepted=self._total)

    async def _open(self) -> RunStatus:
        """Open the run, or take up one that stands: then what waits is published again, for nobody knows if
        it was.
        """
        run_id = (await self._ledger.open_run(self._spec, self._spec.run_id)).run_id
        await self._ledger.set_run_state(run_id, RunState.OPEN)
        status = await self._ledger.run(run_id)
        if status is None:
            msg = f"run {run_id} vanished from the ledger"
            raise LedgerError(msg)
        if status.cursor:
            for stage in Stage:
                await self._publisher.publish(await self._waiting(stage))
        return status

    async def _waiting(self, stage: Stage) -> list[Ticket]:
        _, tickets = await self._ledger.waiting(stage, 0.0, 2 * self._window)
        return [ticket for ticket in tickets if ticket.run_id == self._spec.run_id]

    @staticmethod
    async def _first_end(
        end: asyncio.Task[None], stop: asyncio.Task[bool], parts: list[asyncio.Task[None]]
    ) -> None:
        """Return when the run has ended or shall stop; raise what any part of it raised."""
        running: set[asyncio.Task[None] | asyncio.Task[bool]] = {end, stop, *parts}
        while running & {end, stop} == {end, stop}:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    async def _wind_down(self, end: asyncio.Task[None]) -> None:
        """Start nothing new, wait for what is in flight, and say that the run was interrupted."""
        deadline = time.monotonic() + self._grace
        run_id = self._spec.run_id
        try:
            await self._ledger.set_run_state(run_id, RunState.PAUSED)
            while not end.done() and time.monotonic() < deadline and await self._unfinished():
                await asyncio.wait([end], timeout=min(_DUE_INTERVAL, max(0.0, deadline - time.monotonic())))
        except LedgerError as error:
            raise Interrupted(str(error)) from error
        if not end.done():
            raise Interrupted
        end.result()

    async def _unfinished(self) -> int:
        """Return how many rollouts are worked on or wait for the archive: all open ones but queued ones."""
        status = await self._ledger.run(self._spec.run_id)
        return status.open - status.queued if status else 0

    async def _watch(self) -> None:
        """Publish retries when they are due, sooner than the sweep would, and count what is in flight."""
        while True:
            if status := await patiently(partial(self._ledger.run, self._spec.run_id)):
                self._in_flight = status.in_flight
                self._on_progress(self._progress())
            if due := await patiently(partial(self._ledger.promote_due, _LARGEST_BATCH)):
                await patiently(partial(self._publisher.publish, due))
            await asyncio.sleep(_DUE_INTERVAL)

    def _progress(self) -> Progress:
        rollouts = self._metrics.counts()
        return Progress(
            total=self._total,
            succeeded=rollouts.succeeded,
            failed=rollouts.failed,
            cancelled=rollouts.cancelled,
            in_flight=min(self._in_flight, self._total - rollouts.ended),
            reward_mean=self._metrics.mean_reward,
        )
