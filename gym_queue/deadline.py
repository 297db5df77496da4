"""The deadline of what a worker waits for. One that strikes late proves that the worker itself did not run,
so it says nothing about what was waited for.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from gym_queue.errors import StageTimeoutError, WorkerStoodStillError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

STANDSTILL = 1.0
"""Seconds. A process that could not do what was due for this long was stopped, swapped out or blocked: a busy
event loop is late by milliseconds.
"""


@asynccontextmanager
async def deadline(seconds: float, sentence: str) -> AsyncIterator[None]:
    """``asyncio.timeout`` whose expiry becomes an error with a class. Errors of the body pass, unless they
    are what it made of being ended.

    Args:
        seconds: how long the body may take; none at all if negative.
        sentence: what to say if it takes longer.

    Raises:
        StageTimeoutError: it took longer.
        WorkerStoodStillError: nobody knows: this process did not run when the time was over.
    """
    clock = asyncio.get_running_loop()
    due, late = clock.time() + max(0.0, seconds), 0.0

    def strike() -> None:
        nonlocal late
        late = clock.time() - due
        timeout.reschedule(clock.time())

    try:
        async with asyncio.timeout(None) as timeout:
            alarm = clock.call_at(due, strike)
            try:
                yield
            finally:
                alarm.cancel()
    except Exception as error:
        if not timeout.expired():
            raise
        if late > STANDSTILL:
            msg = f"the worker stood still for {late:.1f} s or longer"
            raise WorkerStoodStillError(msg) from error
        raise StageTimeoutError(sentence) from error
