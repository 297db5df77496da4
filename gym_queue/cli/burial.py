"""Gives back the work of workers that we know to be dead, long before their leases run out."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from gym_queue.coordinator.patience import patiently
from gym_queue.ledger.base import Retry
from gym_queue.maintenance.audit import audit
from gym_queue.maintenance.publication import offer
from gym_queue.maintenance.reap import bury
from gym_queue.telemetry.machine import is_running, machine

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Collection

    from gym_queue.embedded.stack import Death
    from gym_queue.ledger.base import Lease, Ledger
    from gym_queue.maintenance.sweep import SweepBroker

_BATCH = 1000


async def leased(ledger: Ledger) -> set[int]:
    """Return the ids of the processes of this machine that hold a lease."""
    leases = await ledger.leases()
    return {int(lease.info["pid"]) for lease in leases if lease.info.get("machine") == machine()}


async def hand_back_of_the_dead(
    ledger: Ledger, broker: SweepBroker, living: Collection[int] | None = None
) -> None:
    """Give back what workers of an earlier command left.

    In a ledger that only the ``living`` can be using, all others are gone; in one that is shared (``None``),
    those of this machine whose process is. Nobody failed, the command was stopped: such attempts do not
    count.
    """
    for lease in await ledger.leases():
        if lease.is_server:
            continue
        pid = int(lease.info.get("pid", 0))  # it may have claimed before it said who it is
        if living is None and (lease.info.get("machine") != machine() or is_running(pid)):
            continue
        if living is not None and pid in living:
            continue
        retry = Retry(counted=False, reason=f"worker {lease.worker} was stopped with an earlier command")
        while owned := await ledger.owned(lease.worker, None, _BATCH):
            receipts = [await ledger.commit(attempt.fence, retry) for attempt in owned]
            await offer(broker, [receipt.ticket for receipt in receipts if receipt.ticket is not None])
        await ledger.drop_lease(lease.worker)


async def bury_as_they_die(
    deaths: asyncio.Queue[Death],
    ledger: Ledger,
    broker: SweepBroker,
    could_start: Callable[[int], object] = lambda _: None,
) -> None:
    """Give back the work of this machine's processes that come through ``deaths``. Never ends.

    A ledger that is away is waited for: it may have died with the worker. ``could_start`` is told the ids of
    those that had a lease: they had got ready for work.
    """
    while True:
        death = await deaths.get()
        for lease in await patiently(ledger.leases):
            if _is_of(lease, death.pid):
                could_start(death.pid)
                await patiently(partial(_bury, ledger, broker, lease.worker, death.words))


def _is_of(lease: Lease, pid: int) -> bool:
    """Tell whether a lease is that of this machine's process ``pid``.

    A worker that dies before its first heartbeat has a lease for its first claim, which says nothing of it;
    but its name has its id.
    """
    if not lease.info:
        return f"-{pid}-" in lease.worker
    return (lease.info.get("machine"), lease.info.get("pid")) == (machine(), str(pid))


async def _bury(ledger: Ledger, broker: SweepBroker, worker: str, words: str) -> None:
    """Take a worker's claims away, and publish what waits again: some of it lay in the worker's memory."""
    await bury(ledger, broker, worker, f"worker {worker} {words}")
    await audit(ledger, broker, broker, 0.0)
