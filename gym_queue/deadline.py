"""The deadline of what a worker waits for. One that strikes late proves that the worker itself did not run,
so it says nothing about what was waited for.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from gym_queue.errors import StageTimeoutError, WorkerStoodStillError

if TYPE_CHECKING:
    from types import TracebackType

STANDSTILL = 1.0
"""Seconds. A process that could not do what was due for this long was stopped, swapped out or blocked: a busy
event loop is late by milliseconds.
"""


class Deadline:
    """``asyncio.timeout`` whose expiry becomes an error with a class. Errors of the body pass, unless they
    are what it made of being ended.

    Every rollout sets several, most of which never strike: so it is one timer and no generator.

    Args:
        seconds: how long the body may take; none at all if negative.
        sentence: what to say if it takes longer.

    Raises:
        StageTimeoutError: it took longer.
        WorkerStoodStillError: nobody knows: this process did not run when the time was over.
    """

    __slots__ = ("_alarm", "_cancelling", "_clock", "_due", "_late", "_sentence", "_task", "seconds")

    def __init__(self, seconds: float, sentence: str) -> None:
        self.seconds = seconds
        self._sentence = sentence
        self._late: float | None = None

    async def __aenter__(self) -> None:
        self._clock = asyncio.get_running_loop()
        task = asyncio.current_task()
        if task is None:
            msg = "a deadline ends a task, and there is none"
            raise RuntimeError(msg)
        self._task = task
        self._cancelling = task.cancelling()
        self._due = self._clock.time() + max(0.0, self.seconds)
        self._alarm = self._clock.call_at(self._due, self._strike)

    def _strike(self) -> None:
        self._late = self._clock.time() - self._due
        self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._alarm.cancel()
        if self._late is None:
            return
        # As ``asyncio.timeout`` does: where somebody else cancelled the task as well, that is what happens.
        only_ours = self._task.uncancel() <= self._cancelling
        if isinstance(error, Exception) or (isinstance(error, asyncio.CancelledError) and only_ours):
            if self._late > STANDSTILL:
                msg = f"the worker stood still for {self._late:.1f} s or longer"
                raise WorkerStoodStillError(msg) from error
            raise StageTimeoutError(self._sentence) from error
