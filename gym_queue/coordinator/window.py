"""How many rollouts may be open at once: a number that was set, or one that follows the fleet (G5)."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from gym_queue.coordinator.patience import patiently

if TYPE_CHECKING:
    from gym_queue.ledger.base import Ledger

_log = logging.getLogger(__name__)

LEAST = 1024
"""Rollouts. A small fleet is kept busy while the rows of what it did are on their way to the files."""

ROUNDS = 4
"""Rollouts for each slot of a worker that generates: one that runs, and some for the slot to find at once."""

_REFRESH_INTERVAL = 5.0


class Window:
    """The window of all runs of a fleet together.

    Args:
        ledger: knows which workers there are.
        fixed: the number to use whatever the fleet is.
    """

    def __init__(self, ledger: Ledger, fixed: int | None) -> None:
        self._ledger = ledger
        self._fixed = fixed
        self._size = LEAST
        self._due = 0.0
        self._said = False

    async def size(self) -> int:
        """Return how many rollouts may be open now."""
        if self._fixed is not None:
            return self._fixed
        if time.monotonic() >= self._due:
            self._size = max(LEAST, ROUNDS * await self._slots())
            self._due = time.monotonic() + _REFRESH_INTERVAL
        return self._size

    async def _slots(self) -> int:
        """Return how many rollouts the workers that generate hold at once, all together."""
        leases = await patiently(self._ledger.leases)
        slots = sum(int(lease.info.get("slots") or 0) for lease in leases if lease.info.get("kind") == "gpu")
        if not slots and not self._said:
            _log.warning("no worker that generates is there; the run waits for one")
        self._said = not slots
        return slots
