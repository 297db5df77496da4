"""How many rollouts may be open at once: a number that was set, or one that follows the fleet (G5)."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING

from gym_queue.coordinator.patience import patiently

if TYPE_CHECKING:
    from gym_queue.ledger.base import Ledger

_log = logging.getLogger(__name__)

AHEAD = 1536
"""Rollouts beyond the slots. Fast ones are many in a moment: slots find the next at once while the rows of
the last are on their way to the files.
"""

PART = 4
"""A large fleet has a quarter of its slots ahead. More would only wait: rollouts of 30 s on 10,000 slots end
at 333 a second, and whatever comes with a higher priority waits for what lies in the queue already.
"""

_REFRESH_INTERVAL = 5.0


class Window:
    """The window of all runs of a fleet together.

    Args:
        ledger: knows which workers there are.
        fixed: the number to use whatever the fleet is.
        first: what to answer the first time, so that a run begins before the ledger has told of its workers.
    """

    def __init__(self, ledger: Ledger, fixed: int | None, first: int | None = None) -> None:
        self._ledger = ledger
        self._fixed = fixed
        self._first = first
        self._size = AHEAD
        self._due = 0.0
        self._said = False

    async def size(self) -> int:
        """Return how many rollouts may be open now."""
        if self._fixed is not None:
            return self._fixed
        first, self._first = self._first, None
        if first is not None:
            return first
        if time.monotonic() >= self._due:
            generate, verify = await self._slots()
            self._size = generate + verify + max(AHEAD, generate // PART)
            self._due = time.monotonic() + _REFRESH_INTERVAL
        return self._size

    async def _slots(self) -> tuple[int, int]:
        """Return how many rollouts the workers that generate hold at once, all together, and those that
        verify.
        """
        slots = Counter[str]()
        for lease in await patiently(self._ledger.leases):
            slots[lease.info.get("kind", "")] += int(lease.info.get("slots") or 0)
        if not slots["gpu"] and not self._said:
            _log.warning("no worker that generates is there; the run waits for one")
        self._said = not slots["gpu"]
        return slots["gpu"], slots["cpu"]
