"""A worker's look at itself: what the ledger says it owns and it does not work on is handed back.

Such attempts are left by an answer that was lost, by outcomes that the ledger did not take in time, and by a
Redis that crashed and forgot what it had not yet written to its disk. Nobody would notice before their
deadline, and then they would pass for rollouts that took too long.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from gym_queue.ledger.base import Retry
from gym_queue.maintenance.publication import offer
from gym_queue.pipeline import attempt_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from gym_queue.ledger.base import Ledger
    from gym_queue.pipeline import Attempt, Publisher

_log = logging.getLogger(__name__)

_BATCH = 10_000


async def disown(
    ledger: Ledger,
    publisher: Publisher,
    worker: str,
    running: Collection[Attempt],
    unknown: Collection[Attempt] = (),
) -> frozenset[Attempt]:
    """Hand back what ``worker`` owns and was not working on, now and at the previous call.

    Twice, for between the two looks, at the ledger and at the worker, a rollout may begin or end.

    Args:
        ledger: what says who owns what.
        publisher: where the tickets of the next attempts go.
        worker: the caller.
        running: what it works on (``Pipeline.running``).
        unknown: what the previous call returned.

    Returns:
        What is owned and not worked on, for the next call.
    """
    idle = {
        attempt: fence
        for fence in await ledger.claimed(worker, _BATCH)
        if (attempt := attempt_of(fence)) not in running
    }
    lost = [attempt for attempt in idle if attempt in unknown]
    retry = Retry(counted=False, reason=f"worker {worker} had lost track of it")
    receipts = await asyncio.gather(*(ledger.commit(idle.pop(attempt), retry) for attempt in lost))
    await offer(publisher, [receipt.ticket for receipt in receipts if receipt.ticket is not None])
    if handed_back := sum(receipt.accepted for receipt in receipts):
        _log.warning("handed back %d rollouts that the ledger thought were worked on here", handed_back)
    return frozenset(idle)
