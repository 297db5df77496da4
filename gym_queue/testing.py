"""Helpers for tests, ours and those of users: wait for a thing to be true, never for a time to pass."""

from __future__ import annotations

import asyncio
import inspect
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gym_queue.ledger.base import Ledger
    from gym_queue.lifecycle import RolloutState

_INTERVAL = 0.01


def wait_until(predicate: Callable[[], object], timeout: float = 10.0, *, what: str = "") -> None:
    """Return as soon as ``predicate()`` is true; ``AssertionError`` naming ``what`` after ``timeout`` s."""
    deadline = time.monotonic() + timeout
    while not predicate():
        if time.monotonic() > deadline:
            raise AssertionError(_complaint(predicate, timeout, what))
        time.sleep(_INTERVAL)


async def async_wait_until(
    predicate: Callable[[], object | Awaitable[object]],
    timeout: float = 10.0,  # noqa: ASYNC109 - it polls; there is nothing to cancel
    *,
    what: str = "",
) -> None:
    """Like ``wait_until``, leaving the event loop free; the predicate may be a coroutine function."""
    deadline = time.monotonic() + timeout
    while True:
        answer = predicate()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return
        if time.monotonic() > deadline:
            raise AssertionError(_complaint(predicate, timeout, what))
        await asyncio.sleep(_INTERVAL)


async def state_of(ledger: Ledger, run_id: str, example_index: int, sample_index: int) -> RolloutState | None:
    """Return the state of a rollout; ``None`` once its whole group has ended (or it never was)."""
    found = await ledger.whereabouts(run_id, example_index, sample_index)
    return found.state if found else None


def _complaint(predicate: Callable[[], object], timeout: float, what: str) -> str:
    return f"waited {timeout:g} s in vain for {what or getattr(predicate, '__name__', 'a predicate')}"
