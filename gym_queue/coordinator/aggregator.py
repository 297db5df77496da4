"""Reads ended rollouts in batches, archives them durably, counts them, and only then lets the ledger drop
them.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING

from gym_queue.coordinator.patience import patiently
from gym_queue.coordinator.room import once_there_is_room

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gym_queue.coordinator.archive import Archive
    from gym_queue.coordinator.delivery import Delivery
    from gym_queue.coordinator.metrics import Metrics
    from gym_queue.ledger.base import Event, Ledger


_LARGEST_BATCH = 1000
_WAIT = 1.0
_SHORT_WAIT = 0.05
_LINGER = 0.02
"""Seconds between two batches, so that several rows share a sync of the disk, which costs more than a row."""


class Aggregator:
    """Aggregates one run, until all of it is ``done``.

    A crash between archive and acknowledgement brings the batch back; the archive knows what it holds and
    writes it once. A full disk is waited for: what is not acknowledged fills the window, and nothing new is
    begun.

    Args:
        ledger: where ended rollouts come from.
        run_id: the run.
        archive: where they go.
        metrics: counts them.
        done: whether nothing more will come.
        restless: whether that may change without a batch, so that it is asked again soon.
        delivery: decides groups of what is on the disk, before that is acknowledged.
        on_batch: called after each batch.

    Attributes:
        stopped: set it when no more will come.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        run_id: str,
        archive: Archive,
        metrics: Metrics,
        done: Callable[[], bool],
        restless: Callable[[], bool],
        delivery: Delivery,
        on_batch: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._run_id = run_id
        self._archive = archive
        self._metrics = metrics
        self._done = done
        self._restless = restless
        self._delivery = delivery
        self._on_batch = on_batch
        self.stopped = False

    async def run(self) -> None:
        """Aggregate to the end. Raises ``StorageError`` if the archive cannot be written, for other reasons
        than a full disk; nothing is acknowledged then.
        """
        while not self._done() and not self.stopped:
            wait, began = _SHORT_WAIT if self._restless() else _WAIT, time.monotonic()
            size = await self.step(wait)
            rested = not size and time.monotonic() - began >= wait  # else nobody waited: there is no such run
            if size < _LARGEST_BATCH and not rested:
                await asyncio.sleep(_LINGER)

    async def step(self, wait: float) -> int:
        """Aggregate one batch, waiting up to ``wait`` seconds for one. Returns its size."""
        events = await patiently(partial(self._ledger.events, self._run_id, "", _LARGEST_BATCH, wait))
        if not events:
            return 0
        await self._delivery.look()
        await self.store(events)
        await patiently(partial(self._ledger.acknowledge, self._run_id, events[-1].position))
        self._on_batch()
        return len(events)

    async def store(self, events: Sequence[Event]) -> None:
        """Store a batch, once there is room."""
        await once_there_is_room(partial(self._store, events))

    async def _store(self, events: Sequence[Event]) -> None:
        fresh = await asyncio.to_thread(self._archive.append, events)
        for event in fresh:
            self._metrics.add(event.summary)
        await self._delivery.stored(fresh)
