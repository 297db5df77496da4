"""One run from its first example to its last row: feeder and aggregator side by side."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from gym_queue.coordinator.aggregator import Aggregator
from gym_queue.coordinator.delivery import Delivery
from gym_queue.coordinator.feeder import Feeder
from gym_queue.coordinator.metrics import Healed
from gym_queue.coordinator.patience import patiently
from gym_queue.coordinator.sidework import beside
from gym_queue.coordinator.window import AHEAD, Window
from gym_queue.errors import GymQueueError, LedgerError
from gym_queue.records import Record, RunState, Stage
from gym_queue.telemetry.story import speak_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from gym_queue.coordinator.archive import Archive
    from gym_queue.coordinator.groups import Groups
    from gym_queue.coordinator.metrics import Metrics, RunMetrics
    from gym_queue.coordinator.progress import ProgressFile
    from gym_queue.coordinator.source import Source
    from gym_queue.ledger.base import Ledger
    from gym_queue.pipeline import Publisher
    from gym_queue.records import RunSpec, RunStatus, Ticket

_log = logging.getLogger(__name__)

_DUE_INTERVAL = 0.5
_ENDING_INTERVAL = 0.02
_LARGEST_BATCH = 1000


class Interrupted(GymQueueError):  # noqa: N818 - an event, not a mistake
    """The run was interrupted; what had ended is in the archive."""


class Cancelled(GymQueueError):  # noqa: N818 - the same
    """The run was cancelled; all that it had taken in has ended and is in the archive."""


class Progress(Record):
    """Where a run stands, in rollouts. ``in_flight`` are those begun by a worker."""

    total: int
    succeeded: int
    failed: int
    cancelled: int
    in_flight: int
    reward_mean: float | None
    paused: bool = False


class Coordinator:
    """Drives one run.

    Args:
        ledger: where rollouts stand.
        publisher: where tickets go.
        spec: the run; its id is its idempotency key, so a coordinator that died is continued by the next one.
        source: the examples.
        archive: where rows go, open; what it holds already is not done again.
        metrics: what the archive holds already has been added.
        window: how many rollouts may be open at once; ``None``: as many as fit the fleet.
        on_progress: called after each batch of ended rollouts, and every half second.
        cancel: ends what is still open of this run, which was cancelled.
        groups: decides groups, open; ``None``: nobody asks for groups.
        cancel_samples: ends the open samples of some examples, given by index with the reasons. Groups need
            it.
        progress: says how far the run is to those who read its files meanwhile. With it, a run that was
            paused stays so.
        paused: tells whether the run is to be paused where the ledger does not know it (any more).
        on_end: awaited with the metrics and the final state when all has been written, before anybody is told
            that the run is over.
    """

    def __init__(  # noqa: PLR0913 - what a run is made of, one keyword each
        self,
        *,
        ledger: Ledger,
        publisher: Publisher,
        spec: RunSpec,
        source: Source,
        archive: Archive,
        metrics: Metrics,
        window: int | None,
        on_progress: Callable[[Progress], None],
        cancel: Callable[[], Awaitable[object]],
        groups: Groups | None = None,
        cancel_samples: Callable[[Mapping[int, str]], Awaitable[object]] | None = None,
        progress: ProgressFile | None = None,
        paused: Callable[[], Awaitable[bool]] | None = None,
        on_end: Callable[[RunMetrics, RunState], Awaitable[object]] | None = None,
    ) -> None:
        self._ledger = ledger
        self._publisher = publisher
        self._spec = spec
        self._archive = archive
        self._metrics = metrics
        self._on_progress = on_progress
        self._cancel = cancel
        self._grace = 0.0
        self._interrupted = asyncio.Event()
        self._cancelled = False
        self._healed_before = Healed()
        self._source = source
        self._paused = paused
        self._on_end = on_end
        self._delivery = Delivery(
            ledger=ledger,
            spec=spec,
            source=source,
            archive=archive,
            metrics=metrics,
            groups=groups,
            progress=progress,
            cancel_samples=cancel_samples,
        )
        self._window = Window(ledger, window, first=AHEAD)
        self._feeder = Feeder(
            ledger=ledger,
            publisher=publisher,
            run_id=spec.run_id,
            samples=spec.samples,
            source=source,
            archive=archive,
            window=self._window,
            reopen=self._reopen,
            allowed=self._delivery.allowed if groups else None,
        )
        self._aggregator = self._new_aggregator()

    def _new_aggregator(self) -> Aggregator:
        return Aggregator(
            ledger=self._ledger,
            run_id=self._spec.run_id,
            archive=self._archive,
            metrics=self._metrics,
            done=self._is_done,
            restless=self._is_restless,
            delivery=self._delivery,
            on_batch=self._on_batch,
        )

    def interrupt(self, grace: float) -> None:
        """Stop pulling; ``run`` raises ``Interrupted`` once what is in flight has ended, after ``grace``
        seconds at the latest.

        This pauses the run, so it is not for one with ``progress``, which would stay so: cancel ``run``, and
        what is in flight goes on until another coordinator takes over.
        """
        self._grace = grace
        self._interrupted.set()

    def more_examples(self) -> None:
        """Look at once whether the source has more examples. Whoever appends elsewhere cannot tell: for them,
        the feeder looks now and then.
        """
        self._feeder.room_changed.set()

    async def run(self) -> RunMetrics:
        """Run to the end and return the metrics.

        Raises:
            Interrupted: ``interrupt`` was called.
            Cancelled: somebody cancelled the run.
            StorageError: the archive cannot be written, and waiting will not help. The ledger keeps what was
                not archived.
        """
        work = asyncio.create_task(self._work())
        stop = asyncio.create_task(self._interrupted.wait())
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                await self._wind_down(work)
            await work
        finally:
            for task in (work, stop):
                task.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)
        if self._was_cut_short():
            raise Cancelled
        return self._metrics.snapshot(accepted=self._archive.count)

    async def _work(self) -> None:
        """Open the run, feed and aggregate it to its end, and let the ledger forget it."""
        speak_of(self._spec.run_id)
        if self._delivery.decides or self._delivery.reports:
            await self._delivery.begin()
            await self._aggregator.store(())
        await patiently(self._open)
        helpers = [self._feeder.run(), self._watch()]
        if self._delivery.decides:
            helpers += [self._delivery.trim(), self._end_with_enough()]
        async with beside(*helpers) as during:
            await during(self._aggregator.run())
        run_id = self._spec.run_id
        await patiently(self._look)
        final = RunState.CANCELLED if self._was_cut_short() else RunState.ENDED
        if self._on_end:
            await self._on_end(self._metrics.snapshot(accepted=self._archive.count), final)
        await patiently(partial(self._ledger.set_run_state, run_id, RunState.ENDED))
        if self._delivery.reports:  # before the ledger forgets: only it knows that the run was cancelled
            self._delivery.final = final
            await self._aggregator.store(())
        await patiently(partial(self._ledger.forget_run, run_id))

    async def _open(self) -> None:
        """Open the run, or take up one that stands: then what waits is published again, for nobody knows if
        it was.
        """
        run_id = self._spec.run_id
        known = await self._make()
        if known.state is RunState.OPEN and known.cursor == 0:  # new, or as good as
            return
        if not await self._set_open(run_id):
            status = await self._ledger.run(run_id)
            if status is None or status.state is RunState.ENDED:  # its coordinator died while it forgot it
                await self._ledger.forget_run(run_id)
                await self._make()
        status = await self._ledger.run(run_id)
        if status is None:
            msg = f"run {run_id} vanished from the ledger"
            raise LedgerError(msg)
        if status.cursor:
            for stage in Stage:
                await self._publisher.publish(await self._waiting(stage))

    async def _make(self) -> RunStatus:
        """Let the ledger know the run, if it does not, and return how it stands there."""
        known = await self._ledger.open_run(self._spec, self._spec.run_id)
        if self._paused and await self._paused():
            await self._ledger.set_run_state(self._spec.run_id, RunState.PAUSED)
        return known

    async def _set_open(self, run_id: str) -> bool:
        """Open the run, unless it is paused and goes on by itself: then that was meant. Returns false if it
        is in a final state.
        """
        status = await self._ledger.run(run_id) if self._delivery.reports else None
        if status is not None and status.state is RunState.PAUSED:
            return True
        return await self._ledger.set_run_state(run_id, RunState.OPEN)

    async def _reopen(self) -> None:
        """Open a run anew that the ledger has lost (a flush, a failover, a Redis that forgot what it had not
        yet written to its disk). The feeder starts over and leaves out what the archive holds.
        """
        _log.warning("the ledger has lost run %s; it starts over with what the files lack", self._spec.run_id)
        self._healed_before = self._metrics.healed or Healed()
        await patiently(self._make)

    async def _waiting(self, stage: Stage) -> list[Ticket]:
        _, tickets = await self._ledger.waiting(stage, 0.0, 2 * await self._window.size())
        return [ticket for ticket in tickets if ticket.run_id == self._spec.run_id]

    async def _wind_down(self, work: asyncio.Task[None]) -> None:
        """Start nothing new, wait for what is in flight, and say that the run was interrupted."""
        deadline = time.monotonic() + self._grace
        try:
            await self._ledger.set_run_state(self._spec.run_id, RunState.PAUSED)
            while not work.done() and time.monotonic() < deadline and await self._unfinished():
                await asyncio.wait([work], timeout=min(_DUE_INTERVAL, max(0.0, deadline - time.monotonic())))
        except LedgerError as error:
            raise Interrupted(str(error)) from error
        if not work.done():
            raise Interrupted

    async def _unfinished(self) -> int:
        """Return how many rollouts are worked on or wait for the archive: all open ones but queued ones."""
        status = await self._ledger.run(self._spec.run_id)
        return status.open - status.queued if status else 0

    async def _watch(self) -> None:
        """Publish retries when they are due, sooner than the sweep would, see how the run stands, and end it
        when it was cancelled.

        Adds nothing to a counter each time: a run may have nothing to write for long, and its user shall hear
        all the same (from the ledger, once) that Redis takes no writes.
        """
        self._on_progress(self._progress())
        while True:
            await asyncio.sleep(_DUE_INTERVAL)  # first: who starts a run has other questions to the ledger
            await patiently(self._look)
            await patiently(partial(self._ledger.count_republished, self._spec.run_id, 0))
            self._delivery.note()
            self._on_progress(self._progress())
            if self._cancelled:
                await self._end_cancelled()
            if due := await patiently(partial(self._ledger.promote_due, _LARGEST_BATCH)):
                await patiently(partial(self._publisher.publish, due))

    async def _look(self) -> None:
        """Take note of how the run stands in the ledger."""
        status = await self._ledger.run(self._spec.run_id)
        self._delivery.status = status
        if status is not None:
            healed = Healed(**{name: getattr(status, name) for name in Healed.model_fields})
            self._metrics.healed = self._healed_before + healed
            self._cancelled |= status.state is RunState.CANCELLED

    async def _end_cancelled(self) -> None:
        """Feed no more, end what is open, and stop once the archive holds all of it."""
        self._feeder.stopped = True
        if self._delivery.status is not None and self._delivery.status.accepted > self._delivery.status.ended:
            await patiently(self._cancel)
        elif self._delivery.status is None or self._delivery.status.open == 0:
            self._aggregator.stopped = True

    async def _end_with_enough(self) -> None:
        """When as many groups are complete as are wanted, feed no more, end what is open, and stop once the
        archive holds all of it.
        """
        await self._delivery.enough.wait()
        self._feeder.stopped = True
        self._feeder.room_changed.set()
        while not self._aggregator.stopped:
            fed = self._feeder.finished  # asked before the ledger is: it may take in a last step between
            status = await patiently(partial(self._ledger.run, self._spec.run_id))
            if status is not None and status.accepted > status.ended:
                await self._delivery.end_open(_LARGEST_BATCH)
            elif fed and (status is None or status.open == 0):
                self._aggregator.stopped = True
            await asyncio.sleep(_ENDING_INTERVAL)

    def _is_done(self) -> bool:
        """Tell whether the archive holds everything that there is and will be."""
        return self._source.closed and self._archive.count >= self._total

    def _is_restless(self) -> bool:
        """Tell whether the run may end without another row."""
        return not self._source.closed or self._delivery.enough.is_set()

    def _was_cut_short(self) -> bool:
        counts = self._metrics.counts()
        missing = self._total - counts.succeeded - counts.failed
        more = missing > 0 or not self._source.closed
        return self._cancelled and more and not self._delivery.enough.is_set()

    @property
    def _total(self) -> int:
        """Rollouts of the run, as far as is known."""
        return self._source.count * self._spec.samples

    def _on_batch(self) -> None:
        self._feeder.room_changed.set()
        self._on_progress(self._progress())

    def _progress(self) -> Progress:
        rollouts, status = self._metrics.counts(), self._delivery.status
        return Progress(
            total=self._total,
            succeeded=rollouts.succeeded,
            failed=rollouts.failed,
            cancelled=rollouts.cancelled,
            in_flight=min(status.in_flight if status else 0, self._total - rollouts.ended),
            reward_mean=self._metrics.mean_reward,
            paused=status is not None and status.state is RunState.PAUSED,
        )
