"""Compares the ledger with the broker: a ticket that should wait in a queue and does not is published again
(G4).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from gym_queue.records import Stage

if TYPE_CHECKING:
    from gym_queue.ledger.base import Ledger
    from gym_queue.pipeline import Publisher

_log = logging.getLogger(__name__)

_BATCH = 1000


class Broker(Protocol):
    """What the audit asks the broker."""

    async def depth(self, stage: Stage) -> int:
        """Return how many tickets lie in the queue of a stage."""
        ...


async def audit(ledger: Ledger, broker: Broker, publisher: Publisher, grace: float) -> int:
    """Publish the oldest tickets that have waited ``grace`` seconds, as many as the broker's queues lack.

    One ticket too many is harmless: the claim refuses it. So counting is enough, and no queue is read
    through. Also publishes retries whose delay is over. Returns how many tickets were published.
    """
    published = 0
    while due := await ledger.promote_due(_BATCH):
        await publisher.publish(due)
        published += len(due)
    for stage in Stage:
        depth = await broker.depth(stage)
        count, old = await ledger.waiting(stage, grace, _BATCH)
        missing = old[: max(0, count - depth)]
        if missing:
            await publisher.publish(missing)
            published += len(missing)
            _log.info("audit: %d %s tickets published again", len(missing), stage)
    return published
