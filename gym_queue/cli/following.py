"""Follows a run at a head: gives it its examples, and writes what ended into files here, each rollout once.

How far the head's feed was read is kept beside the files (``OUT.run/cursor``), never ahead of them; what
comes again is known by the archive.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from gym_queue.cli import remote
from gym_queue.cli.interrupts import Interrupts
from gym_queue.cli.progress import open_view
from gym_queue.cli.status import say
from gym_queue.client.asynchronous import AsyncClient
from gym_queue.coordinator import manifest
from gym_queue.coordinator.metrics import Healed
from gym_queue.coordinator.room import once_there_is_room
from gym_queue.coordinator.rows import read_summary
from gym_queue.coordinator.run import Cancelled, Progress
from gym_queue.coordinator.sidework import beside
from gym_queue.durable import storage_errors
from gym_queue.errors import (
    ExamplesRefusedError,
    GymQueueError,
    HeadAwayError,
    HeadFailedError,
    NotFoundError,
    RequestRefusedError,
    UsageError,
)
from gym_queue.ledger.base import Event
from gym_queue.records import RunState

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from gym_queue.cli.job import Job
    from gym_queue.client.feed import Line
    from gym_queue.client.run import AsyncRun
    from gym_queue.coordinator.metrics import RunMetrics

_log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that a head which does not answer at all is waited for."""

_MOST_LINES = 1000
_MOST_BYTES = 8 << 20
_LINGER = 0.02
"""Seconds to wait for another row, so that several share a sync of the disk."""

_SAVE_INTERVAL = 1.0
_LOOK_INTERVAL = 2.0
_REDRAW_INTERVAL = 0.5


def collect(job: Job) -> RunMetrics:
    """Have the head do what is left to do, and return the metrics.

    Raises:
        GymQueueError: the head refuses the run, or the files cannot be written.
        Cancelled: the run was cancelled at the head.
    """
    return asyncio.run(_collect(job))


async def _collect(job: Job) -> RunMetrics:
    with Interrupts():
        client = AsyncClient(job.head, job.settings.auth_token, patience=PATIENCE)
        try:
            run = await _found(job, client)
            job.started = True
            say(f"run {run.run_id} is done by the fleet of the head at {job.head}")
            try:
                return await _Follower(job, run).follow()
            except ExamplesRefusedError as error:  # it could only be continued with other input
                await run.cancel()
                msg = f"{error}; the run at the head is cancelled"
                raise UsageError(msg) from error
        finally:
            await client.close()


async def _found(job: Job, client: AsyncClient) -> AsyncRun:
    """Submit the run, or take up the one that an earlier command submitted; give it the examples it lacks."""
    if job.spec.run_id != job.manifest.key:
        try:
            run = await client.run(job.spec.run_id)
        except NotFoundError as error:
            msg = f"{error}; is {job.head} the head that {job.paths.rows} came from?"
            raise UsageError(msg) from error
    else:
        wanted = remote.request(job.options, job.settings, job.spec, job.source)
        run = await client.submit(idempotency_key=job.manifest.key, **dict(wanted))
        job.spec = job.spec.model_copy(update={"run_id": run.run_id})
        job.manifest = job.manifest.model_copy(update={"spec": job.spec})
        manifest.write(job.paths.run_dir, job.manifest)
    if not run.view.closed:
        there = run.view.examples
        run.feed(remote.rows(job.source, there), offset=there)
    return run


class _Follower:
    """Writes one run's rollouts into its files as they come."""

    def __init__(self, job: Job, run: AsyncRun) -> None:
        self._job = job
        self._run = run
        self._cursor = _Cursor(job.paths.run_dir / "cursor")
        self._view = open_view(sys.stderr, job.total, job.archive.count)
        self._in_flight = 0
        self._paused = False

    async def follow(self) -> RunMetrics:
        """Follow the run to its end."""
        with contextlib.closing(self._view):
            async with beside(self._look(), self._redraw()) as during:
                ended = await during(self._read_all())
        await self._take_healed()
        count, total = self._job.archive.count, self._job.total
        if ended is RunState.CANCELLED and count < total:
            raise Cancelled
        if count < total:
            msg = f"run {self._run.run_id} has ended at the head with {count} of {total} rollouts"
            raise HeadFailedError(msg)
        return self._job.metrics.snapshot(accepted=count)

    async def _read_all(self) -> RunState:
        """Read the feed from where an earlier command left it; return how the run ended.

        If the files lack what was read before that place (somebody changed them), or the head does not know
        the place, all is read: what is there already is not written twice.
        """
        if cursor := self._cursor.read():
            try:
                ended = await self._read(cursor)
            except ExamplesRefusedError:
                raise
            except RequestRefusedError as error:
                _log.info("the feed is read from its beginning: %s", error)
            else:
                if ended is not RunState.ENDED or self._job.archive.count >= self._job.total:
                    return ended
        return await self._read("")

    async def _read(self, cursor: str) -> RunState:
        """Read the feed from a cursor to its end; return how the run ended."""
        ended = RunState.OPEN
        try:
            async with aclosing(self._run.lines("rollouts", cursor, with_end=True)) as lines:
                async for batch in _batches(lines):
                    if batch[-1].kind == "end":
                        ended = RunState(_parsed(batch.pop())["state"])
                    if batch:
                        await self._store(batch)
                        self._cursor.save(batch[-1].cursor)
        finally:
            self._cursor.flush()
        return ended

    async def _store(self, batch: list[Line]) -> None:
        events = [_event(line) for line in batch]

        async def write() -> None:
            for event in await asyncio.to_thread(self._job.archive.append, events):
                self._job.metrics.add(event.summary)

        await once_there_is_room(write)
        self._show()

    async def _look(self) -> None:
        """Ask now and then how the run stands, and what it waits for."""
        said = None
        while True:
            with contextlib.suppress(HeadAwayError):  # the feed waits for it, and it is said there
                view = await self._run.status()
                self._in_flight, self._paused = view.in_flight, view.state is RunState.PAUSED
                if view.waiting_for != said and (said := view.waiting_for):
                    self._view.note(said)
                self._show()
            await asyncio.sleep(_LOOK_INTERVAL)

    async def _redraw(self) -> None:
        while True:
            await asyncio.sleep(_REDRAW_INTERVAL)
            self._view.refresh()

    def _show(self) -> None:
        counts, total = self._job.metrics.counts(), self._job.total
        self._view.update(
            Progress(
                total=total,
                succeeded=counts.succeeded,
                failed=counts.failed,
                cancelled=counts.cancelled,
                in_flight=min(self._in_flight, total - counts.ended),
                reward_mean=self._job.metrics.mean_reward,
                paused=self._paused,
            )
        )

    async def _take_healed(self) -> None:
        """Take from the head what was healed on the way; without it, the metrics say that it is not known."""
        try:
            healed = (await self._run.metrics()).get("healed")
            self._job.metrics.healed = healed and Healed.model_validate(healed)
        except (GymQueueError, ValidationError) as error:
            _log.info("what was healed is not known: %s", error)


class _Cursor:
    """How far the feed was read. What is saved is on the disk later than the rows before it, never sooner."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._newest = self._saved = ""
        self._due = 0.0

    def read(self) -> str:
        """Return what an earlier command saved; empty: the beginning."""
        try:
            self._newest = self._saved = self._path.read_text().strip()
        except (OSError, UnicodeDecodeError):
            return ""
        return self._newest

    def save(self, cursor: str) -> None:
        """Take note of a cursor, and write it if that was not done just now."""
        self._newest = cursor
        if time.monotonic() >= self._due:
            self.flush()
            self._due = time.monotonic() + _SAVE_INTERVAL

    def flush(self) -> None:
        """Write the newest cursor. A crash leaves an older one, or none."""
        if self._newest == self._saved:
            return
        temporary = self._path.with_suffix(".tmp")
        with storage_errors(f"{self._path} cannot be written"):
            temporary.write_text(self._newest)
            temporary.replace(self._path)
        self._saved = self._newest


async def _batches(lines: AsyncGenerator[Line]) -> AsyncGenerator[list[Line]]:
    """Yield lines in batches: what comes without a pause, as much as may be in memory at once."""
    batch: list[Line] = []
    size = 0
    coming: asyncio.Task[Line | None] | None = None
    try:
        while True:
            coming = coming or asyncio.create_task(_next(lines))
            await asyncio.wait([coming], timeout=_LINGER if batch else None)
            if coming.done():
                line, coming = coming.result(), None
                if line is not None:
                    batch.append(line)
                    size += len(line.body)
                    if len(batch) < _MOST_LINES and size < _MOST_BYTES:
                        continue
                elif not batch:
                    return
            yield batch
            batch, size = [], 0
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


async def _next(lines: AsyncGenerator[Line]) -> Line | None:
    return await anext(lines, None)


def _event(line: Line) -> Event:
    try:
        return Event(position=line.cursor, summary=read_summary(line.body), row=line.body)
    except ValidationError as error:
        msg = f"the head sends a rollout that cannot be read: {error.errors()[0]['msg']}"
        raise HeadFailedError(msg) from error


def _parsed(line: Line) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(line.body)
    return parsed
