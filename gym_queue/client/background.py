"""An event loop in a thread of its own, for callers that have none."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from gym_queue.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
    from typing import Any

_Result = TypeVar("_Result")

_END_TIMEOUT = 10.0


@dataclass
class _Open:
    """What callers have not done with: calls that go on, and what is iterated over."""

    calls: set[asyncio.Task[Any]] = field(default_factory=set)
    items: set[AsyncGenerator[Any]] = field(default_factory=set)


class BackgroundLoop:
    """Runs coroutines for threads that wait for them. Any number of threads may call.

    It ends by ``close``, when nobody has it any more, or with the process. A fork copies the object but not
    its thread: there, every call is refused.

    Args:
        last: what is done at its end.
    """

    def __init__(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gym_queue client", daemon=True)
        self._thread.start()
        self._open = _Open()
        self._end = weakref.finalize(self, _end, self._pid, self._loop, self._thread, self._open, last)

    def close(self) -> None:
        """Do what is to be done at the end, and end the thread. Safe to repeat."""
        self._end()

    def call(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Run a coroutine to its end and return its result. An interrupt of the caller cancels it first.

        Raises:
            UsageError: the loop was closed, this is a fork of its process, or its own thread.
        """
        if reason := self._is_unusable():
            work.close()
            raise UsageError(reason)
        outcome: Future[_Result] = Future()
        tasks: list[asyncio.Task[_Result]] = []

        def start() -> None:
            task = self._loop.create_task(work)
            tasks.append(task)
            self._open.calls.add(task)
            task.add_done_callback(self._open.calls.discard)
            task.add_done_callback(lambda task: _hand_over(task, outcome))

        def cancel() -> None:
            tasks[0].cancel()

        self._loop.call_soon_threadsafe(start)
        try:
            return outcome.result()
        finally:
            if not outcome.done():
                self._loop.call_soon_threadsafe(cancel)
                wait([outcome], _END_TIMEOUT)

    def iterate(self, items: AsyncGenerator[_Result]) -> Iterator[_Result]:
        """Yield what an asynchronous generator yields; leaving early closes it."""
        self._open.items.add(items)
        try:
            while (item := self.call(_next(items))) is not None:
                yield item
        finally:
            self._open.items.discard(items)
            if not self._is_unusable():
                self.call(items.aclose())

    def _is_unusable(self) -> str:
        """Return why no call can be made here and now; empty if one can."""
        if self._pid != os.getpid():
            return "this client belongs to the process that this one was forked from; make one here"
        if not self._end.alive:
            return "this client is closed"
        if threading.current_thread() is self._thread:
            return "this client cannot be used from its own thread; coroutines use AsyncClient"
        return ""


def _end(
    pid: int,
    loop: asyncio.AbstractEventLoop,
    thread: threading.Thread,
    still: _Open,
    last: Callable[[], Coroutine[Any, Any, None]],
) -> None:
    """End a loop from any thread (a garbage collector may run anywhere); in a fork there is none."""
    if pid != os.getpid():
        return
    ending = asyncio.run_coroutine_threadsafe(_wind_up(still, last), loop)
    ending.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
    if threading.current_thread() is not thread:
        thread.join(_END_TIMEOUT)
        if not thread.is_alive():
            loop.close()


async def _wind_up(still: _Open, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """End calls, then iterations (of which one may go through others), and only then what they go through."""
    try:
        calls = list(still.calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        for items in list(still.items):
            await items.aclose()
        await last()
    finally:
        loop = asyncio.get_running_loop()
        await loop.shutdown_asyncgens()
        await loop.shutdown_default_executor()


def _hand_over(task: asyncio.Task[_Result], outcome: Future[_Result]) -> None:
    """Give the caller's thread what a task came to."""
    if task.cancelled():
        outcome.set_exception(UsageError("this client was closed meanwhile"))
    elif (error := task.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())


async def _next(items: AsyncGenerator[_Result]) -> _Result | None:
    return await anext(items, None)
