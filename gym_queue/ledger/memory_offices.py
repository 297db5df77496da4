"""The offices of the ledger in memory: who leads, and until when."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class MemoryOffices:
    """The part of ``gym_queue.ledger.memory.MemoryLedger`` that fills offices."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._offices: dict[str, tuple[str, float]] = {}  # who holds it, and until when

    async def lead(self, office: str, holder: str, term: float) -> bool:
        """See ``Ledger.lead``."""
        now = self._clock()
        standing, until = self._offices.get(office, (holder, now))
        if standing != holder and now < until:
            return False
        self._offices[office] = holder, now + term
        return True

    async def resign(self, office: str, holder: str) -> None:
        """See ``Ledger.resign``."""
        if self._offices.get(office, ("", 0.0))[0] == holder:
            del self._offices[office]
