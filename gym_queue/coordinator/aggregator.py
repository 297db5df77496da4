"""Reads ended rollouts in batches, archives them durably, counts them, and only then lets the ledger drop
them.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from gym_queue.coordinator.patience import patiently

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gym_queue.coordinator.archive import Archive
    from gym_queue.coordinator.metrics import Metrics
    from gym_queue.ledger.base import Event, Ledger

_LARGEST_BATCH = 1000
_WAIT = 1.0
_LINGER = 0.02
"""Seconds between two batches, so that several rows share a sync of the disk, which costs more than a row."""


class Aggregator:
    """Aggregates one run, until the archive holds ``total`` rollouts.

    A crash between archive and acknowledgement brings the batch back; the archive knows what it holds and
    writes it once.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        run_id: str,
        archive: Archive,
        metrics: Metrics,
        total: int,
        on_batch: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._run_id = run_id
        self._archive = archive
        self._metrics = metrics
        self._total = total
        self._on_batch = on_batch

    async def run(self) -> None:
        """Aggregate to the end. Raises ``StorageError`` if the archive cannot be written; nothing is
        acknowledged then.
        """
        while self._archive.count < self._total:
            if await self.step(_WAIT) < _LARGEST_BATCH:
                await asyncio.sleep(_LINGER)

    async def step(self, wait: float) -> int:
        """Aggregate one batch, waiting up to ``wait`` seconds for one. Returns its size."""
        events = await patiently(partial(self._ledger.events, self._run_id, "", _LARGEST_BATCH, wait))
        if not events:
            return 0
        storing = asyncio.create_task(self._store(events))
        try:
            await asyncio.shield(storing)
        except asyncio.CancelledError:  # the thread goes on, and whoever cancels will close the archive next
            await asyncio.wait([storing])
            raise
        await patiently(partial(self._ledger.acknowledge, self._run_id, events[-1].position))
        self._on_batch()
        return len(events)

    async def _store(self, events: Sequence[Event]) -> None:
        for event in await asyncio.to_thread(self._archive.append, events):
            self._metrics.add(event.summary)
