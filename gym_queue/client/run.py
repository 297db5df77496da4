"""A run at the head: its examples go in while what ended comes out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pydantic import ValidationError

from gym_queue.api import RunView
from gym_queue.client.batches import Batch, Batcher, batches, encoded
from gym_queue.client.deliveries import group_of, rollout_of
from gym_queue.client.feed import follow
from gym_queue.errors import ExamplesRefusedError, HeadFailedError, RequestRefusedError, UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from gym_queue.client.batches import Examples
    from gym_queue.client.connection import Connection
    from gym_queue.client.deliveries import Group, Rollout
    from gym_queue.client.feed import Line

_log = logging.getLogger(__name__)

FAILURES_SHOWN = 100

_FEW = 16
"""Rows."""


class AsyncRun:
    """One run. Made by ``AsyncClient.submit`` and ``AsyncClient.run``; ``view`` is what it was like then.

    Every method may raise the errors of ``Connection.call``. A head that is away is waited for within the
    client's patience, and by feeds and the appending of examples for as long as it takes.
    """

    def __init__(self, connection: Connection, view: RunView) -> None:
        self.run_id = view.run_id
        self.view = view
        self._connection = connection
        self._path = run_path(view.run_id)
        self._count = view.examples
        self._order = asyncio.Lock()
        self._feeding: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.run_id} at {self._connection.base}>"

    async def status(self) -> RunView:
        """Return where the run stands now."""
        return view_of(await self._connection.call("GET", self._path))

    async def metrics(self) -> dict[str, Any]:
        """Return the run's metrics so far, as they stand in ``OUT.metrics.json``."""
        metrics: dict[str, Any] = await self._connection.call("GET", f"{self._path}/metrics")
        return metrics

    async def failures(
        self, failure_class: str | None = None, limit: int = FAILURES_SHOWN
    ) -> list[dict[str, Any]]:
        """Return which rollouts failed, the first to end in front: ``rollout_id``, ``class``, ``stage``,
        ``attempt`` and ``error`` of each; all but the cancelled ones, or those of a class (``cancelled``).
        """
        params = {"limit": str(limit)} | ({"class": failure_class} if failure_class else {})
        answer = await self._connection.call("GET", f"{self._path}/failures", params=params)
        rows: list[dict[str, Any]] = answer["failures"]
        return rows

    async def cancel(self) -> RunView:
        """End the run: nothing new is begun, what is open ends as cancelled."""
        return await self._order_to("cancel")

    async def pause(self) -> RunView:
        """Begin nothing new until ``resume``."""
        return await self._order_to("pause")

    async def resume(self) -> RunView:
        """Go on after ``pause``."""
        return await self._order_to("resume")

    async def close(self) -> RunView:
        """Say that no more examples will come: the run ends once all that it has have ended."""
        return await self._order_to("close", forever=True)

    async def append(self, examples: Examples, *, offset: int | None = None) -> int:
        """Give the run more examples, and return how many it has then.

        They go in batches, each exactly once, whatever happens to the connection.

        Args:
            examples: rows, or the path of a JSONL file.
            offset: how many examples come before these; by default all that this client knows of. What the
                run has already is compared, not taken twice.

        Raises:
            ConflictError: the run has other examples there, or is closed.
            ExamplesRefusedError: a row cannot be used; those of earlier batches were taken.
            UsageError: a row cannot be sent.
        """
        async with self._order:
            if offset is not None:
                self._count = offset
            async for batch in _batches_of(examples, self._count):
                await self._append(batch)
            return self._count

    async def flush(self) -> None:
        """Wait until the head has all examples that ``submit`` was given. Raises what went wrong."""
        if self._feeding is not None:
            await asyncio.shield(self._feeding)

    async def groups(self, cursor: str | None = None, *, dropped: bool = False) -> AsyncGenerator[Group]:
        """Yield each group as it is decided, once, until the run has ended.

        Disconnections and restarts of the head are waited out and change nothing. A reader that died goes on
        with the cursor of the last group that it is done with.

        Args:
            cursor: ``Group.cursor`` of the last group that was read; ``None``: from the beginning.
            dropped: also those that are not ``complete``.
        """
        params = {"dropped": "true"} if dropped else {}
        async with aclosing(self.lines("groups", cursor, params)) as lines:
            async for line in lines:
                yield group_of(line)

    async def rollouts(self, cursor: str | None = None) -> AsyncGenerator[Rollout]:
        """Yield each rollout as it ends, once, until the run has ended; ``cursor`` as in ``groups``."""
        async with aclosing(self.lines("rollouts", cursor)) as lines:
            async for line in lines:
                yield rollout_of(line)

    async def lines(
        self,
        feed: str,
        cursor: str | None = None,
        params: dict[str, str] | None = None,
        *,
        with_end: bool = False,
    ) -> AsyncGenerator[Line]:
        """Yield the lines of a feed (``rollouts``, ``groups``) as they are, the end line only if asked for.

        Raises:
            GymQueueError: the examples could not be submitted, so the run would never end.
        """
        path = f"{self._path}/{feed}"
        async with aclosing(follow(self._connection, path, cursor or "", params or {})) as lines:
            while (line := await self._next(lines)) is not None and (with_end or line.kind != "end"):
                yield line

    def feed(self, examples: Examples, *, offset: int = 0) -> None:
        """Begin to append examples, the first at ``offset``, and to close the run then, in the background."""
        self._feeding = asyncio.create_task(self._feed(examples, offset))
        self._feeding.add_done_callback(_mark_as_seen)

    async def stop(self) -> None:
        """Stop what goes on in the background."""
        if self._feeding is not None and not self._feeding.done():
            _log.warning("not all examples of run %s were submitted; it is still open", self.run_id)
            self._feeding.cancel()
            await asyncio.gather(self._feeding, return_exceptions=True)

    async def _feed(self, examples: Examples, offset: int) -> None:
        await self.append(examples, offset=offset)
        await self.close()

    async def _append(self, batch: Batch) -> None:
        params = {"offset": str(self._count)}
        headers = {"Content-Type": "application/x-ndjson"}
        try:
            await self._connection.call(
                "POST",
                f"{self._path}/examples",
                forever=True,
                params=params,
                data=batch.body,
                headers=headers,
            )
        except RequestRefusedError as error:
            msg = f"of examples {self._count} to {self._count + batch.rows - 1} none was taken: {error}"
            raise ExamplesRefusedError(msg) from error
        self._count += batch.rows

    async def _order_to(self, what: str, *, forever: bool = False) -> RunView:
        return view_of(await self._connection.call("POST", f"{self._path}/{what}", forever=forever))

    async def _next(self, lines: AsyncIterator[Line]) -> Line | None:
        """Return the next line; if the feeding of examples fails before one comes, raise that."""
        feeding = self._feeding
        if feeding is None or (feeding.done() and not feeding.cancelled() and feeding.exception() is None):
            return await anext(lines, None)
        coming = asyncio.create_task(_one(lines))
        try:
            await asyncio.wait({coming, feeding}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                if feeding.cancelled():
                    msg = "this client was closed before all examples were submitted"
                    raise UsageError(msg)
                feeding.result()
            return await coming
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


def run_path(run_id: str) -> str:
    """Return where a run is found below the head's URL."""
    return f"/v1/runs/{quote(run_id, safe='')}"


def view_of(answer: Any) -> RunView:
    """Read a run's view; a newer head may say more of it than is known here.

    Raises:
        HeadFailedError: it is none.
    """
    try:
        return RunView.model_validate(answer, extra="ignore")
    except ValidationError as error:
        first = error.errors()[0]
        msg = f"the head describes a run that cannot be read ({first['loc']}: {first['msg']})"
        raise HeadFailedError(msg) from error


async def _one(lines: AsyncIterator[Line]) -> Line | None:
    return await anext(lines, None)


def _mark_as_seen(task: asyncio.Task[None]) -> None:
    """Keep asyncio from reporting an error that every reader is told, and that ``flush`` raises."""
    if not task.cancelled():
        task.exception()


async def _batches_of(examples: Examples, first: int) -> AsyncIterator[Batch]:
    """Yield examples in batches. A source that blocks (a file, a generator) is read in a thread, and so are
    many rows; a few are encoded in less time than a thread takes.
    """
    if isinstance(examples, AsyncIterable):
        batcher, index = Batcher(), first
        async for row in examples:
            if batch := batcher.add(encoded(row, index)):
                yield batch
            index += 1
        if rest := batcher.rest():
            yield rest
        return
    making = batches(examples, first)
    if isinstance(examples, list | tuple) and len(examples) <= _FEW:
        for batch in making:
            yield batch
    else:
        while (found := await asyncio.to_thread(next, making, None)) is not None:
            yield found
