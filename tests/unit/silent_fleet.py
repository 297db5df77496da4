"""A road whose workers can fall silent, under a clock of our own: what tests of the sweep share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gym_queue.errors import BrokerError
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.maintenance.audit import audit
from gym_queue.maintenance.reap import reap
from gym_queue.records import Stage
from tests.unit.road import Road, World

if TYPE_CHECKING:
    from gym_queue.ledger.base import Claim
    from gym_queue.records import Ticket

TIMEOUT, LEASE, GRACE = 300.0, 60.0, 5.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


class Broker:
    """Says how many tickets lie in each queue, unless it is ``away``."""

    def __init__(self) -> None:
        self.depths = dict.fromkeys(Stage, 0)
        self.away: set[Stage] = set()

    async def depth(self, stage: Stage) -> int:
        if stage in self.away:
            raise BrokerError
        return self.depths[stage]


class Fleet(Road):
    """A road whose workers can fall silent, under a clock of our own."""

    def __init__(self, world: World | None = None) -> None:
        self.clock = Clock()
        super().__init__(world=world or World(), ledger=MemoryLedger(self.clock))
        self.broker = Broker()

    async def claim(self, ticket: Ticket, worker: str) -> Claim:
        await self.ledger.heartbeat(worker, {})
        claim = await self.ledger.claim(ticket, worker, LEASE)
        assert claim is not None
        return claim

    async def reap(self) -> int:
        return await reap(self.ledger, self.publisher, TIMEOUT)

    async def audit(self) -> list[Ticket]:
        """Return what the audit published."""
        count = await audit(self.ledger, self.broker, self.publisher, GRACE)
        published = self.publisher.take()
        assert len(published) == count
        return published

    async def workers(self) -> set[str]:
        return {lease.worker for lease in await self.ledger.leases()}
