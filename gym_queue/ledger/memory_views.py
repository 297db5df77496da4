"""What the ledger in memory keeps and shows: its records, and the methods that look and move nothing."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gym_queue.ledger.base import Event, Lease, OpenRollout, OwnedAttempt, Whereabouts
from gym_queue.ledger.memory_census import MemoryCensus
from gym_queue.lifecycle import TERMINAL, WAITING_STATE, RolloutState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gym_queue.records import Example, Fence, RunStatus, Stage, Ticket, Weights


@dataclass
class KeptSample:
    """One sample of an open group."""

    since: float
    state: RolloutState = RolloutState.QUEUED
    attempt: int = 1
    failures: int = 0
    fence: Fence | None = None  # while a worker owns it
    payload: bytes | None = None
    reason: str = ""


@dataclass
class KeptGroup:
    """An example with samples that have not all ended."""

    example: Example
    accepted_at: float
    samples: dict[int, KeptSample]


@dataclass
class KeptRun:
    """A run with its open groups, and the results that nobody has acknowledged."""

    status: RunStatus
    key: str
    groups: dict[int, KeptGroup] = field(default_factory=dict)
    results: dict[int, Event] = field(default_factory=dict)
    position: int = 0

    def count(self, **changes: int) -> None:
        """Add to counters of its status."""
        values = {name: getattr(self.status, name) + by for name, by in changes.items()}
        self.status = self.status.model_copy(update=values)


class MemoryViews(MemoryCensus):
    """The reading half of ``gym_queue.ledger.memory.MemoryLedger``."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self._clock = clock
        self._runs: dict[str, KeptRun] = {}
        self._keys: dict[str, str] = {}
        self._waiting: dict[Ticket, float] = {}
        self._delayed: dict[Ticket, float] = {}
        self._claims: dict[str, dict[Fence, float]] = {}
        self._revoked: dict[str, list[Fence]] = {}
        self._leases: dict[str, tuple[float, dict[str, str]]] = {}
        self._weights: dict[str, Weights] = {}
        self._offices: dict[str, tuple[str, float]] = {}  # who holds it, and until when
        self._changed = asyncio.Condition()

    def _find(
        self, run_id: str, example_index: int, sample_index: int
    ) -> tuple[KeptRun | None, KeptSample | None]:
        run = self._runs.get(run_id)
        group = run.groups.get(example_index) if run else None
        return run, group.samples.get(sample_index) if group else None

    async def run(self, run_id: str) -> RunStatus | None:
        """See ``Ledger.run``."""
        run = self._runs.get(run_id)
        return run.status if run else None

    async def runs(self) -> list[RunStatus]:
        """See ``Ledger.runs``."""
        return sorted((run.status for run in self._runs.values()), key=lambda status: -status.spec.priority)

    async def open_rollouts(
        self, run_id: str, limit: int, examples: Sequence[int] | None = None
    ) -> list[OpenRollout]:
        """See ``Ledger.open_rollouts``."""
        run = self._runs.get(run_id)
        now = self._clock()
        found = [
            OpenRollout(
                example=group.example,
                example_index=index,
                sample_index=number,
                accepted_at=group.accepted_at,
                seen_at=now,
                state=sample.state,
                attempt=sample.attempt,
                since=sample.since,
            )
            for index, group in (sorted(run.groups.items()) if run else ())
            if examples is None or index in examples
            for number, sample in sorted(group.samples.items())
            if sample.state not in TERMINAL
        ]
        return found[:limit]

    async def whereabouts(self, run_id: str, example_index: int, sample_index: int) -> Whereabouts | None:
        """See ``Ledger.whereabouts``."""
        run, sample = self._find(run_id, example_index, sample_index)
        if run is None or sample is None:
            return None
        fence = sample.fence
        earlier = [ticket for ticket, at in self._waiting.items() if at < sample.since]
        return Whereabouts(
            state=sample.state,
            attempt=sample.attempt,
            failures=sample.failures,
            accepted_at=run.groups[example_index].accepted_at,
            seen_at=self._clock(),
            since=sample.since,
            worker=fence.worker if fence else "",
            deadline=self._claims[fence.worker].get(fence) if fence else None,
            ahead=sum(WAITING_STATE[ticket.stage] is sample.state for ticket in earlier),
            reason=sample.reason,
        )

    async def events(self, run_id: str, after: str, limit: int, wait: float) -> list[Event]:
        """See ``Ledger.events``."""
        run = self._runs.get(run_id)
        if run is None:
            return []
        first = int(after or 0)

        def newer() -> list[Event]:
            return [event for position, event in run.results.items() if position > first][:limit]

        if wait > 0 and not newer():
            try:
                async with asyncio.timeout(wait), self._changed:
                    await self._changed.wait_for(newer)
            except TimeoutError:
                return []
        return newer()

    async def waiting(self, stage: Stage, older_than: float, limit: int) -> tuple[int, list[Ticket]]:
        """See ``Ledger.waiting``."""
        tickets = [(at, ticket) for ticket, at in self._waiting.items() if ticket.stage is stage]
        tickets.sort(key=lambda item: (item[0], item[1].example_index, item[1].samples))
        newest = self._clock() - older_than
        return len(tickets), [ticket for at, ticket in tickets if at <= newest][:limit]

    async def leases(self) -> list[Lease]:
        """See ``Ledger.leases``."""
        now = self._clock()
        return [
            Lease(worker=worker, age=now - at, info=info, round_trip=self._round_trip(worker))
            for worker, (at, info) in self._leases.items()
        ]

    async def owned(self, worker: str, overdue_by: float | None, limit: int) -> list[OwnedAttempt]:
        """See ``Ledger.owned``."""
        now = self._clock()
        newest = float("inf") if overdue_by is None else now - overdue_by
        found = []
        for fence, deadline in list(self._claims.get(worker, {}).items()):
            if deadline > newest:
                continue
            run, sample = self._find(fence.run_id, fence.example_index, fence.sample_index)
            if run is None or sample is None or sample.fence != fence:
                del self._claims[worker][fence]
                continue
            group = run.groups[fence.example_index]
            found.append(
                OwnedAttempt(
                    fence=fence,
                    example=group.example,
                    accepted_at=group.accepted_at,
                    seen_at=now,
                    failures=sample.failures,
                    payload=sample.payload,
                )
            )
        return found[:limit]

    async def claimed(self, worker: str, limit: int) -> list[Fence]:
        """See ``Ledger.claimed``."""
        return list(self._claims.get(worker, ()))[:limit]

    async def weights(self, model: str) -> Weights | None:
        """See ``Ledger.weights``."""
        return self._weights.get(model)
