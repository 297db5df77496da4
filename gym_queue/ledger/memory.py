"""The ledger in this process's memory: the twin of the Redis ledger for tests and for reading what the
contract means.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gym_queue.errors import ConflictError
from gym_queue.ledger.base import (
    Claim,
    ClaimedSample,
    Ended,
    Event,
    Generated,
    Lease,
    Outcome,
    OwnedAttempt,
    Receipt,
    Retry,
    fence_of,
    next_ticket,
)
from gym_queue.lifecycle import RUNNING_STATE, TERMINAL, WAITING_STATE, RolloutState
from gym_queue.records import Example, Fence, RunSpec, RunState, RunStatus, Stage, Summary, Ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gym_queue.records import Group

_FINAL = (RunState.CANCELLED, RunState.ENDED)


@dataclass
class _Sample:
    since: float
    state: RolloutState = RolloutState.QUEUED
    attempt: int = 1
    failures: int = 0
    worker: str = ""
    payload: bytes | None = None


@dataclass
class _Group:
    example: Example
    accepted_at: float
    samples: dict[int, _Sample]


@dataclass
class _Run:
    status: RunStatus
    key: str
    groups: dict[int, _Group] = field(default_factory=dict)
    results: dict[int, Event] = field(default_factory=dict)
    position: int = 0

    def count(self, **changes: int) -> None:
        values = {name: getattr(self.status, name) + by for name, by in changes.items()}
        self.status = self.status.model_copy(update=values)


class MemoryLedger:
    """``gym_queue.ledger.base.Ledger`` in memory. Every method runs without a pause, so each is atomic."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._runs: dict[str, _Run] = {}
        self._keys: dict[str, str] = {}
        self._waiting: dict[Ticket, float] = {}
        self._delayed: dict[Ticket, float] = {}
        self._claims: dict[str, dict[Fence, float]] = {}
        self._leases: dict[str, tuple[float, dict[str, str]]] = {}
        self._changed = asyncio.Condition()

    async def open_run(self, spec: RunSpec, idempotency_key: str) -> RunSpec:
        """See ``Ledger.open_run``."""
        if idempotency_key not in self._keys:
            if spec.run_id in self._runs:
                msg = f"run {spec.run_id} was submitted under another idempotency key"
                raise ConflictError(msg)
            self._keys[idempotency_key] = spec.run_id
            self._runs[spec.run_id] = _Run(RunStatus(spec=spec, state=RunState.OPEN), idempotency_key)
        run_id = self._keys[idempotency_key]
        standing = self._runs[run_id].status.spec
        if standing.identity() != spec.identity():
            msg = (
                f"idempotency key {idempotency_key!r} was used for run {run_id} with other input or settings"
            )
            raise ConflictError(msg)
        return standing

    async def run(self, run_id: str) -> RunStatus | None:
        """See ``Ledger.run``."""
        run = self._runs.get(run_id)
        return run.status if run else None

    async def runs(self) -> list[RunStatus]:
        """See ``Ledger.runs``."""
        return sorted((run.status for run in self._runs.values()), key=lambda status: -status.spec.priority)

    async def set_run_state(self, run_id: str, state: RunState) -> bool:
        """See ``Ledger.set_run_state``."""
        run = self._runs.get(run_id)
        if run is None or run.status.state in _FINAL:
            return False
        run.status = run.status.model_copy(update={"state": state})
        return True

    async def forget_run(self, run_id: str) -> None:
        """See ``Ledger.forget_run``."""
        run = self._runs.pop(run_id, None)
        if run:
            self._keys.pop(run.key, None)
        for tickets in (self._waiting, self._delayed):
            for ticket in [ticket for ticket in tickets if ticket.run_id == run_id]:
                del tickets[ticket]

    async def accept(
        self, run_id: str, cursor: int, next_cursor: int, groups: Sequence[Group]
    ) -> list[Ticket]:
        """See ``Ledger.accept``."""
        run = self._runs.get(run_id)
        if run is None or run.status.state is not RunState.OPEN:
            return []
        tickets = [
            Ticket(
                stage=Stage.GENERATE,
                run_id=run_id,
                example_index=group.example_index,
                samples=group.samples,
                attempt=1,
            )
            for group in groups
        ]
        if run.status.cursor != cursor:
            return tickets if run.status.cursor == next_cursor else []
        now = self._clock()
        for group, ticket in zip(groups, tickets, strict=True):
            samples = {sample: _Sample(since=now) for sample in group.samples}
            run.groups[group.example_index] = _Group(group.example, now, samples)
            self._waiting[ticket] = now
        opened = sum(len(group.samples) for group in groups)
        run.count(cursor=next_cursor - cursor, accepted=opened, queued=opened)
        return tickets

    async def claim(self, ticket: Ticket, worker: str, lease: float) -> Claim | None:
        """See ``Ledger.claim``."""
        run = self._runs.get(ticket.run_id)
        if run and run.status.state is RunState.PAUSED and ticket.stage is Stage.GENERATE:
            if ticket in self._waiting:
                self._waiting[ticket] = self._clock()
            return None
        self._waiting.pop(ticket, None)
        if run is None or run.status.state in _FINAL:
            return None
        group = run.groups.get(ticket.example_index)
        now = self._clock()
        granted = []
        for index in ticket.samples:
            sample = group.samples.get(index) if group else None
            if (
                sample is None
                or sample.state is not WAITING_STATE[ticket.stage]
                or sample.attempt != ticket.attempt
            ):
                continue
            sample.state, sample.worker = RUNNING_STATE[ticket.stage], worker
            fence = fence_of(ticket, index, worker)
            self._claims.setdefault(worker, {})[fence] = now + lease
            granted.append(
                ClaimedSample(
                    fence=fence,
                    accepted_at=group.accepted_at if group else now,
                    queued_at=sample.since,
                    failures=sample.failures,
                    payload=sample.payload,
                )
            )
        if not granted or group is None:
            return None
        if ticket.stage is Stage.GENERATE:
            run.count(queued=-len(granted))
        self._leases.setdefault(worker, (now, {}))
        return Claim(example=group.example, samples=tuple(granted), claimed_at=now)

    async def commit(self, fence: Fence, outcome: Outcome) -> Receipt:
        """See ``Ledger.commit``."""
        run = self._runs.get(fence.run_id)
        group = run.groups.get(fence.example_index) if run else None
        sample = group.samples.get(fence.sample_index) if group else None
        self._claims.get(fence.worker, {}).pop(fence, None)
        held = sample and (sample.state, sample.attempt, sample.worker)
        if run is None or sample is None or held != (RUNNING_STATE[fence.stage], fence.attempt, fence.worker):
            if run:
                run.count(refused=1)
            return Receipt(accepted=False)
        now = self._clock()
        match outcome:
            case Generated(payload=payload):
                ticket = next_ticket(fence, Stage.VERIFY, 1)
                sample.state, sample.attempt, sample.failures = RolloutState.VERIFY_QUEUED, 1, 0
                sample.since, sample.worker, sample.payload = now, "", payload
                self._waiting[ticket] = now
                return Receipt(accepted=True, ticket=ticket)
            case Ended(summary=summary, row=row):
                await self._end(run, fence.example_index, fence.sample_index, summary, row)
                return Receipt(accepted=True)
            case Retry(delay=delay, counted=counted):
                sample.state, sample.worker, sample.since = WAITING_STATE[fence.stage], "", now + delay
                sample.attempt += 1
                sample.failures += counted
                run.count(retried=int(counted), queued=int(fence.stage is Stage.GENERATE))
                ticket = next_ticket(fence, fence.stage, sample.attempt)
                if delay > 0:
                    self._delayed[ticket] = now + delay
                    return Receipt(accepted=True)
                self._waiting[ticket] = now
                return Receipt(accepted=True, ticket=ticket)

    async def _end(
        self, run: _Run, example_index: int, sample_index: int, summary: Summary, row: bytes
    ) -> None:
        run.position += 1
        run.results[run.position] = Event(position=str(run.position), summary=summary, row=row)
        run.count(**{summary.state: 1})
        group = run.groups[example_index]
        sample = group.samples[sample_index]
        sample.state, sample.payload = RolloutState(summary.state), None
        if all(sample.state in TERMINAL for sample in group.samples.values()):
            del run.groups[example_index]
        async with self._changed:
            self._changed.notify_all()

    async def cancel(
        self, run_id: str, example_index: int, sample_index: int, row: bytes, summary: Summary
    ) -> bool:
        """See ``Ledger.cancel``."""
        state = await self.state_of(run_id, example_index, sample_index)
        if state is None or state in TERMINAL:
            return False
        run = self._runs[run_id]
        run.count(queued=-int(state is RolloutState.QUEUED))
        await self._end(run, example_index, sample_index, summary, row)
        return True

    async def open_rollouts(self, run_id: str, limit: int) -> list[tuple[Example, int, int, float]]:
        """See ``Ledger.open_rollouts``."""
        run = self._runs.get(run_id)
        found = [
            (group.example, index, number, group.accepted_at)
            for index, group in (run.groups.items() if run else ())
            for number, sample in group.samples.items()
            if sample.state not in TERMINAL
        ]
        return found[:limit]

    async def state_of(self, run_id: str, example_index: int, sample_index: int) -> RolloutState | None:
        """See ``Ledger.state_of``."""
        run = self._runs.get(run_id)
        group = run.groups.get(example_index) if run else None
        sample = group.samples.get(sample_index) if group else None
        return sample.state if sample else None

    async def events(self, run_id: str, after: str, limit: int, wait: float) -> list[Event]:
        """See ``Ledger.events``."""
        run = self._runs.get(run_id)
        if run is None:
            return []
        first = int(after or 0)

        def newer() -> list[Event]:
            return [event for position, event in run.results.items() if position > first][:limit]

        if wait > 0 and not newer():
            async with self._changed:
                try:
                    await asyncio.wait_for(self._changed.wait_for(newer), wait)
                except TimeoutError:
                    return []
        return newer()

    async def acknowledge(self, run_id: str, position: str) -> int:
        """See ``Ledger.acknowledge``."""
        run = self._runs.get(run_id)
        if run is None:
            return 0
        done = [known for known in run.results if known <= int(position)]
        for known in done:
            del run.results[known]
        run.count(archived=len(done))
        return len(done)

    async def promote_due(self, limit: int) -> list[Ticket]:
        """See ``Ledger.promote_due``."""
        now = self._clock()
        due = [ticket for ticket, at in sorted(self._delayed.items(), key=lambda item: item[1]) if at <= now][
            :limit
        ]
        for ticket in due:
            del self._delayed[ticket]
            self._waiting[ticket] = now
        return due

    async def waiting(self, stage: Stage, older_than: float, limit: int) -> tuple[int, list[Ticket]]:
        """See ``Ledger.waiting``."""
        tickets = [(at, ticket) for ticket, at in self._waiting.items() if ticket.stage is stage]
        tickets.sort(key=lambda item: (item[0], item[1].example_index, item[1].samples))
        newest = self._clock() - older_than
        return len(tickets), [ticket for at, ticket in tickets if at <= newest][:limit]

    async def heartbeat(self, worker: str, info: dict[str, str]) -> bool:
        """See ``Ledger.heartbeat``."""
        known = worker in self._leases
        self._leases[worker] = (self._clock(), {"worker": worker} | info)
        return known

    async def leases(self) -> list[Lease]:
        """See ``Ledger.leases``."""
        now = self._clock()
        return [Lease(worker=worker, age=now - at, info=info) for worker, (at, info) in self._leases.items()]

    async def owned(self, worker: str, overdue_by: float | None, limit: int) -> list[OwnedAttempt]:
        """See ``Ledger.owned``."""
        now = self._clock()
        newest = float("inf") if overdue_by is None else now - overdue_by
        found = []
        for fence, deadline in list(self._claims.get(worker, {}).items()):
            if deadline > newest:
                continue
            run = self._runs.get(fence.run_id)
            group = run.groups.get(fence.example_index) if run else None
            sample = group.samples.get(fence.sample_index) if group else None
            held = sample and (sample.state, sample.attempt, sample.worker)
            if group is None or sample is None or held != (RUNNING_STATE[fence.stage], fence.attempt, worker):
                del self._claims[worker][fence]
                continue
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

    async def drop_lease(self, worker: str) -> None:
        """See ``Ledger.drop_lease``."""
        if not self._claims.get(worker):
            self._leases.pop(worker, None)
            self._claims.pop(worker, None)

    async def close(self) -> None:
        """Nothing to close."""
