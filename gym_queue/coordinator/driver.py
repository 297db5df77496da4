"""Drives one run of the head from its folder to its end, as often as that takes."""

from __future__ import annotations

import asyncio
import logging
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from gym_queue.coordinator.archive import Archive, is_being_written
from gym_queue.coordinator.groups import Groups
from gym_queue.coordinator.metrics import Metrics, write_metrics
from gym_queue.coordinator.patience import patiently
from gym_queue.coordinator.progress import ProgressFile
from gym_queue.coordinator.run import Cancelled, Coordinator
from gym_queue.coordinator.run_folder import request_of
from gym_queue.coordinator.sidework import beside
from gym_queue.errors import DiskFullError, GymQueueError
from gym_queue.records import RunState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from gym_queue.coordinator.manifest import Manifest
    from gym_queue.coordinator.metrics import RunMetrics
    from gym_queue.coordinator.muster import Muster
    from gym_queue.coordinator.progress import Written
    from gym_queue.coordinator.run_folder import RunFolder
    from gym_queue.coordinator.source import Source
    from gym_queue.environments.base import Environment
    from gym_queue.ledger.base import Ledger
    from gym_queue.pipeline import Publisher
    from gym_queue.records import RunSpec

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0
_LOCK_PAUSE = 0.2
_MUSTER_PAUSE = 0.5
_WISH_INTERVAL = 0.5
_METRICS_INTERVAL = 5.0


def _heard_by_nobody(_: Path) -> AbstractContextManager[Callable[[Written], None]]:
    return nullcontext(lambda _: None)


@dataclass(frozen=True)
class Means:
    """What all runs of a head are driven with.

    ``cancel`` ends what is open of a run that is to be cancelled, ``cancel_samples`` the open samples of some
    examples, given by index with the reasons. ``driving`` is entered with the folder of a run's progress file
    while the run is driven; what it gives is called, from any thread, with what that file says.
    """

    ledger: Ledger
    publisher: Publisher
    muster: Muster
    window: int | None
    environments: Callable[[str], Environment]
    cancel: Callable[[str], Awaitable[object]]
    cancel_samples: Callable[[RunSpec, Mapping[int, str]], Awaitable[object]]
    driving: Callable[[Path], AbstractContextManager[Callable[[Written], None]]] = _heard_by_nobody


class Driver:
    """Drives one run. Whoever cancels ``drive`` leaves the run to the next, with its files closed.

    Args:
        folder: the run's.
        means: what to drive it with.
        wish: what is wished of the run at first.
    """

    def __init__(self, folder: RunFolder, means: Means, wish: RunState) -> None:
        self._folder = folder
        self._means = means
        self._wish = wish
        self._wished = asyncio.Event()
        self._said: str | None = ""
        self._coordinator: Coordinator | None = None
        self.run_id = folder.path.name

    def wish(self, wish: RunState) -> None:
        """Say what is wished of the run now."""
        if wish is not self._wish:
            self._wish = wish
            self._wished.set()

    def more_examples(self) -> None:
        """Say that examples were appended to the run."""
        if self._coordinator is not None:  # else it will find them when it begins
            self._coordinator.more_examples()

    async def drive(self) -> None:
        """Drive the run to its end. What fails is said, and tried again after a pause that grows."""
        pause = _FIRST_PAUSE
        clock = asyncio.get_running_loop().time
        while True:
            begun = clock()
            try:
                await self._wait_for_files()
                await self._drive()
            except GymQueueError as error:
                sentence = str(error)
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not take other runs down
                _log.exception("run %s: its coordinator failed", self.run_id)
                sentence = f"its coordinator failed ({type(error).__name__}: {error})"
            else:
                return
            if clock() - begun > _LONGEST_PAUSE:
                pause = _FIRST_PAUSE
            await self._say(f"{sentence}; it is tried again every {pause:g} s", logging.ERROR)
            await self._rest(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _rest(self, pause: float | None) -> None:
        """Wait, but not longer than until something else is wished."""
        with suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._wished.wait()
        self._wished.clear()

    async def _wait_for_files(self) -> None:
        """Wait until the process that drove the run before has closed its files, or is dead."""
        while await asyncio.to_thread(is_being_written, self._folder.paths.run_dir):
            await self._say("another process is still writing its files", logging.WARNING)
            await asyncio.sleep(_LOCK_PAUSE)

    async def _drive(self) -> None:
        plan = await asyncio.to_thread(self._folder.manifest)
        if plan is None:  # deleted
            return
        spec = plan.spec
        metrics = Metrics(spec.samples)
        groups = Groups(spec, self._folder.paths.run_dir)
        archive = Archive(self._folder.paths.rows, spec.samples)
        try:
            source = await _whole(asyncio.to_thread(self._open, plan, archive, metrics, groups))
            if (await asyncio.to_thread(self._folder.written)).final:  # another ended it meanwhile
                return
            await self._make_ready(spec, archive)
            run_dir = self._folder.paths.run_dir
            with self._means.driving(run_dir) as tell:
                progress = ProgressFile(run_dir, tell)
                await self._coordinate(spec, source, archive, metrics, groups, progress)
        finally:
            groups.close()
            archive.close()

    def _open(self, plan: Manifest, archive: Archive, metrics: Metrics, groups: Groups) -> Source:
        source = self._folder.source(request_of(plan), self._means.environments)
        archive.open(resume=True, on_row=metrics.add)
        groups.open(archive)
        for note in (*archive.notes, *groups.notes):
            _log.warning("run %s: %s", self.run_id, note)
        return source

    async def _make_ready(self, spec: RunSpec, archive: Archive) -> None:
        """Wait for the workers with whom a run begins; one that is cancelled waits for nobody."""
        ledger = self._means.ledger
        status = await patiently(partial(ledger.run, self.run_id))
        begun = archive.count or (status is not None and status.cursor)
        while not begun and self._wish is not RunState.CANCELLED:
            missing = await self._means.muster.missing()
            if missing is None:
                break
            await self._say(missing, logging.INFO)
            await asyncio.sleep(_MUSTER_PAUSE)
        await self._say(None, logging.INFO)
        if self._wish is RunState.CANCELLED:
            await patiently(partial(ledger.open_run, spec, self.run_id))
            await patiently(partial(self._means.cancel, self.run_id))

    async def _coordinate(
        self,
        spec: RunSpec,
        source: Source,
        archive: Archive,
        metrics: Metrics,
        groups: Groups,
        progress: ProgressFile,
    ) -> None:
        means = self._means
        file = _MetricsFile(self._folder.paths.metrics, spec)
        coordinator = Coordinator(
            ledger=means.ledger,
            publisher=means.publisher,
            spec=spec,
            source=source,
            archive=archive,
            metrics=metrics,
            window=means.window,
            on_progress=lambda _: None,
            cancel=partial(means.cancel, self.run_id),
            groups=groups,
            cancel_samples=partial(means.cancel_samples, spec),
            progress=progress,
            paused=self._is_to_pause,
            on_end=file.write,
        )
        self._coordinator = coordinator
        try:
            with suppress(Cancelled):
                async with beside(self._mind_wishes(), file.keep_up(metrics)) as during:
                    await during(coordinator.run())
        finally:
            self._coordinator = None  # which knows this driver: the files that it reads are closed with it

    async def _mind_wishes(self) -> None:
        """See to it that the ledger knows what is wished, even after it forgot."""
        before = RunState.OPEN
        while True:
            wish = self._wish
            await self._fulfil(wish, before)
            before = wish
            if self._wish is wish:
                await self._rest(None if wish is RunState.OPEN else _WISH_INTERVAL)

    async def _fulfil(self, wish: RunState, before: RunState) -> None:
        """Tell the ledger what is wished. That a run is open is only told if it was ``paused`` before: it may
        be paused in the ledger alone, which is not ours to undo.
        """
        ledger = self._means.ledger
        if wish is RunState.CANCELLED:
            await patiently(partial(self._means.cancel, self.run_id))
        elif wish is RunState.PAUSED or before is RunState.PAUSED:
            status = await patiently(partial(ledger.run, self.run_id))
            now = await asyncio.to_thread(self._folder.wish)  # what was just resumed must not be paused again
            if status is not None and {status.state, now} == {RunState.OPEN, RunState.PAUSED}:
                await patiently(partial(ledger.set_run_state, self.run_id, now))

    async def _is_to_pause(self) -> bool:
        return await asyncio.to_thread(self._folder.wish) is RunState.PAUSED

    async def _say(self, sentence: str | None, level: int) -> None:
        """Say what the run waits for, to those who look at it and in the log."""
        if sentence == self._said:
            return
        self._said = sentence
        if sentence:
            _log.log(level, "run %s: %s", self.run_id, sentence)
        with suppress(GymQueueError):  # a disk that takes nothing is said where it matters
            await asyncio.to_thread(self._folder.set_waiting_for, sentence)


class _MetricsFile:
    """The metrics of one run while it is driven: so far, and then the last ones."""

    def __init__(self, path: Path, spec: RunSpec) -> None:
        self._path = path
        self._about = {"run_id": spec.run_id, "model": spec.model, "samples": spec.samples}
        self._one_at_a_time = asyncio.Lock()
        self._final = False

    async def keep_up(self, metrics: Metrics) -> None:
        """Write the metrics so far now and then. A full disk is left to the rows, which wait."""
        written: RunMetrics | None = None
        while True:
            now = metrics.snapshot()
            if now != written:
                with suppress(DiskFullError):
                    await self.write(now, RunState.OPEN)
                    written = now
            await asyncio.sleep(_METRICS_INTERVAL)

    async def write(self, metrics: RunMetrics, state: RunState) -> None:
        """Write the metrics of a run in this state; none after those of a final one. Raises
        ``StorageError``.
        """
        async with self._one_at_a_time:
            if not self._final:
                about = {**self._about, "complete": state is RunState.ENDED}
                await _whole(asyncio.to_thread(write_metrics, self._path, metrics, about))
            self._final |= state is not RunState.OPEN


async def _whole(work: Awaitable[_Result]) -> _Result:
    """Await work to its end: who is cancelled meanwhile closes what it opened."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise
