"""Tells what each part of an asyncio program costs, where several share one process.

Every step of a task is timed with the thread's CPU clock and booked on the part that the task belongs to: the
one that its coroutine begins, or else that of the task that created it (context variables are inherited).
Work handed to the loop's default executor is booked the same way. What is left, the event loop itself, is no
part's.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from types import coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Mapping

_part: contextvars.ContextVar[str] = contextvars.ContextVar("part", default="")


class Meter:
    """Books CPU seconds by part. ``parts`` says which coroutine functions (qualified names) begin one."""

    def __init__(self, parts: Mapping[str, str]) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._parts = parts

    def install(self, loop: asyncio.AbstractEventLoop) -> None:
        """Meter the tasks that the loop starts from now on."""
        loop.set_task_factory(self._make_task)
        loop.set_default_executor(_MeteredExecutor(self.seconds))

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, work: Any, context: contextvars.Context | None = None
    ) -> asyncio.Task[Any]:
        context = context or contextvars.copy_context()
        if part := self._parts.get(getattr(work, "__qualname__", "")):
            context.run(_part.set, part)
        metered: Any = self._metered(work, context.get(_part, ""))
        return asyncio.Task(metered, loop=loop, context=context)

    @coroutine
    def _metered(self, work: Coroutine[Any, Any, Any], part: str) -> Generator[Any, Any, Any]:
        value: Any = None
        error: BaseException | None = None
        while True:
            started = time.thread_time()
            try:
                awaited = work.send(value) if error is None else work.throw(error)
            except StopIteration as end:
                return end.value
            finally:
                self.seconds[part] += time.thread_time() - started
            value = error = None
            try:
                value = yield awaited
            except BaseException as thrown:  # noqa: BLE001 - the work decides what to do with it
                error = thrown


class _MeteredExecutor(ThreadPoolExecutor):
    def __init__(self, seconds: defaultdict[str, float]) -> None:
        super().__init__(thread_name_prefix="metered")
        self._seconds = seconds

    def submit(self, function: Callable[..., Any], /, *args: Any, **keywords: Any) -> Future[Any]:
        part = _part.get()

        def timed() -> Any:
            started = time.thread_time()
            try:
                return function(*args, **keywords)
            finally:
                self._seconds[part] += time.thread_time() - started

        return super().submit(timed)


def publisher_seconds() -> float:
    """Return the CPU time of the thread that sends tickets: the feeder's, for nobody else sends here."""
    return sum(
        time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        for thread in threading.enumerate()
        if thread.name.startswith("publisher") and thread.ident
    )
