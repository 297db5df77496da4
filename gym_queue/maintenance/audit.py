"""Compares the ledger with the broker: a ticket that should wait in a queue and does not is published again
(G4).
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Protocol

from gym_queue.errors import BrokerError
from gym_queue.maintenance.publication import offer
from gym_queue.records import Stage

if TYPE_CHECKING:
    from gym_queue.ledger.base import Ledger
    from gym_queue.pipeline import Publisher

_log = logging.getLogger(__name__)

_BATCH = 1000


class Broker(Protocol):
    """What the audit asks the broker."""

    async def depth(self, stage: Stage) -> int:
        """Return how many tickets lie in the queue of a stage. Raises ``BrokerError``."""
        ...


async def audit(ledger: Ledger, broker: Broker, publisher: Publisher, grace: float) -> int:
    """Publish the oldest tickets that have waited ``grace`` seconds, as many as the broker's queues lack.

    One ticket too many is harmless: the claim refuses it. So counting is enough, and no queue is read
    through. Tickets that wait in a worker's memory (``quarantine``) are lacking too: they come again each
    time, for another worker may have room; a worker forgets a ticket that it holds already, so they are
    never more than one a worker. Also publishes retries whose delay is over. Returns how many tickets were
    published.
    """
    published = 0
    while due := await ledger.promote_due(_BATCH):
        published += await offer(publisher, due)
    for stage in Stage:
        try:
            published += await _audit_stage(ledger, broker, publisher, stage, grace)
        except BrokerError as error:
            _log.warning("the %s queue was not audited: %s", stage, error)
    return published


async def _audit_stage(
    ledger: Ledger, broker: Broker, publisher: Publisher, stage: Stage, grace: float
) -> int:
    depth = await broker.depth(stage)
    count, old = await ledger.waiting(stage, grace, _BATCH)
    missing = old[: max(0, count - depth)]
    published = await offer(publisher, missing)
    if published:
        _log.info("audit: %d %s tickets published again", published, stage)
        for run_id, tickets in Counter(ticket.run_id for ticket in missing).items():
            await ledger.count_republished(run_id, tickets)
    return published
