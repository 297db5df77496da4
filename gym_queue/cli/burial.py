"""Gives back the work of workers that we know to be dead, long before their leases run out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gym_queue.errors import GymQueueError
from gym_queue.ledger.base import Retry
from gym_queue.maintenance.reap import lose
from gym_queue.records import FailureClass, Stage
from gym_queue.telemetry.machine import is_running, machine

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Collection

    from gym_queue.ledger.base import Lease, Ledger
    from gym_queue.pipeline import Publisher

_log = logging.getLogger(__name__)

_BATCH = 1000


async def leased(ledger: Ledger) -> set[int]:
    """Return the ids of the processes of this machine that hold a lease."""
    leases = await ledger.leases()
    return {int(lease.info["pid"]) for lease in leases if lease.info.get("machine") == machine()}


async def hand_back_of_the_dead(
    ledger: Ledger, publisher: Publisher, living: Collection[int] | None = None
) -> None:
    """Give back what workers of an earlier command left.

    In a ledger that only the ``living`` can be using, all others are gone; in one that is shared (``None``),
    those of this machine whose process is. Nobody failed, the command was stopped: such attempts do not
    count.
    """
    for lease in await ledger.leases():
        pid = int(lease.info.get("pid", 0))  # it may have claimed before it said who it is
        if living is None and (lease.info.get("machine") != machine() or is_running(pid)):
            continue
        if living is not None and pid in living:
            continue
        while owned := await ledger.owned(lease.worker, None, _BATCH):
            receipts = [await ledger.commit(attempt.fence, Retry(counted=False)) for attempt in owned]
            await publisher.publish([receipt.ticket for receipt in receipts if receipt.ticket is not None])
        await ledger.drop_lease(lease.worker)


async def bury_as_they_die(deaths: asyncio.Queue[int], ledger: Ledger, publisher: Publisher) -> None:
    """Give back the work of this machine's processes whose ids come through ``deaths``. Never ends."""
    while True:
        pid = await deaths.get()
        try:
            for lease in await ledger.leases():
                if (lease.info.get("machine"), lease.info.get("pid")) == (machine(), str(pid)):
                    await _bury(ledger, publisher, lease)
        except GymQueueError as error:
            _log.warning("the work of process %d waits until its lease runs out: %s", pid, error)


async def _bury(ledger: Ledger, publisher: Publisher, lease: Lease) -> None:
    """Take a worker's claims away, and publish what waits again: some of it lay in the worker's memory."""
    while owned := await ledger.owned(lease.worker, None, _BATCH):
        await lose(ledger, publisher, owned, FailureClass.INFRASTRUCTURE, f"worker {lease.worker} died")
    await ledger.drop_lease(lease.worker)
    for stage in Stage:
        _, tickets = await ledger.waiting(stage, 0.0, _BATCH)
        await publisher.publish(tickets)
