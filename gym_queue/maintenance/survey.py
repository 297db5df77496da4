"""What is known of the whole fleet, asked of ledger and broker once a scrape: a head's ``GET /metrics``.

Heads come and go, so none of them counts anything itself: the ledger does, and any head shows the same.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypeVar

from gym_queue.census import Fleet, WorkerStanding
from gym_queue.errors import BrokerError, LedgerError
from gym_queue.records import Stage
from gym_queue.telemetry.exposition import exposed
from gym_queue.telemetry.fleet_metrics import families

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from gym_queue.ledger.base import Lease, Ledger
    from gym_queue.maintenance.audit import Broker

_Answer = TypeVar("_Answer")

_FRESH = 1.0
"""Seconds that an answer is shown again, to whoever asks meanwhile."""

_PATIENCE = 3.0
"""Seconds for ledger and broker to answer. Prometheus itself waits ten."""


async def survey(ledger: Ledger, broker: Broker, patience: float = _PATIENCE) -> Fleet:
    """Ask ledger and broker, ``patience`` seconds at most. What does not answer is left out."""
    census, leases, depths = await asyncio.gather(
        _answer(ledger.census(), patience),
        _answer(ledger.leases(), patience),
        _answer(_depths(broker), patience),
    )
    if leases is None:
        return Fleet(census=census, depths=depths)
    workers = tuple(_standing(lease) for lease in leases if not lease.is_server)
    return Fleet(census=census, workers=workers, servers=len(leases) - len(workers), depths=depths)


async def _depths(broker: Broker) -> dict[Stage, int]:
    return {stage: await broker.depth(stage) for stage in Stage}


async def _answer(question: Awaitable[_Answer], patience: float) -> _Answer | None:
    """Return an answer, or ``None`` from whoever is away (it says so itself)."""
    try:
        async with asyncio.timeout(patience):
            return await question
    except (LedgerError, BrokerError, TimeoutError):
        return None


def _standing(lease: Lease) -> WorkerStanding:
    return WorkerStanding(
        worker=lease.worker,
        kind=lease.info.get("kind", ""),
        age=lease.age,
        slots=int(lease.info.get("slots") or 0),
        used=int(lease.info.get("used") or 0),
        round_trip=lease.round_trip,
    )


class FleetMetrics:
    """The metrics of a fleet. Bound to the event loop that uses it.

    Args:
        ledger: what counts rollouts. One that waits patiently for Redis is given up after three seconds.
        broker: whose queues are measured.
    """

    def __init__(self, ledger: Ledger, broker: Broker) -> None:
        self._ledger = ledger
        self._broker = broker
        self._asking: asyncio.Task[bytes] | None = None
        self._until = 0.0

    async def render(self) -> bytes:
        """Return what Prometheus is answered (``telemetry.exposition.CONTENT_TYPE``). Raises nothing: of what
        is away, ``gym_queue_ledger_up`` and ``gym_queue_broker_up`` say so.

        Ledger and broker are asked once a second, however many ask here.
        """
        if self._asking is None or (self._asking.done() and time.monotonic() > self._until):
            self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> bytes:
        fleet = await survey(self._ledger, self._broker)
        self._until = time.monotonic() + _FRESH
        return exposed(families(fleet))
