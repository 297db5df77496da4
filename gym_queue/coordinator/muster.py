"""Are the workers there that a run waits for (``NUM_EXPECTED_WORKERS``)?"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from gym_queue.coordinator.patience import patiently

if TYPE_CHECKING:
    from gym_queue.ledger.base import Ledger

_REFRESH_INTERVAL = 0.5


class Muster:
    """Counts the workers that generate, for all runs of a head.

    Args:
        ledger: knows which workers there are.
        expected: how many must be there before a run begins.
    """

    def __init__(self, ledger: Ledger, expected: int) -> None:
        self._ledger = ledger
        self._expected = expected
        self._present = 0
        self._due = 0.0

    async def missing(self) -> str | None:
        """Return a sentence that says how many are there, or ``None`` if that is enough."""
        if self._expected and time.monotonic() >= self._due:
            leases = await patiently(self._ledger.leases)
            self._present = sum(lease.info.get("kind") == "gpu" for lease in leases)
            self._due = time.monotonic() + _REFRESH_INTERVAL
        if self._present >= self._expected:
            return None
        verb = "is" if self._present == 1 else "are"
        return f"{self._present} of {self._expected} expected workers that generate {verb} there"
