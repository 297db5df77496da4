"""The ledger in this process's memory: the Redis ledger's twin, for tests and for reading the contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gym_queue.errors import ConflictError
from gym_queue.ledger.base import (
    Claim,
    ClaimedSample,
    Ended,
    Event,
    Generated,
    Outcome,
    Receipt,
    Retry,
    fence_of,
    first_ticket,
    kept_reason,
    next_ticket,
)
from gym_queue.ledger.memory_views import KeptGroup, KeptRun, KeptSample, MemoryViews
from gym_queue.lifecycle import RUNNING_STATE, TERMINAL, WAITING_STATE, RolloutState
from gym_queue.records import Fence, RunSpec, RunState, RunStatus, Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.records import Group, Ticket, Weights

_FINAL = (RunState.CANCELLED, RunState.ENDED)


class MemoryLedger(MemoryViews):
    """``gym_queue.ledger.base.Ledger`` in memory. Every method runs without a pause, so each is atomic."""

    async def open_run(self, spec: RunSpec, idempotency_key: str) -> RunStatus:
        """See ``Ledger.open_run``."""
        if idempotency_key not in self._keys:
            if spec.run_id in self._runs:
                msg = f"run {spec.run_id} was submitted under another idempotency key"
                raise ConflictError(msg)
            self._keys[idempotency_key] = spec.run_id
            status = RunStatus(spec=spec, state=RunState.OPEN, opened_at=self._clock())
            self._runs[spec.run_id] = KeptRun(status, idempotency_key)
        run_id = self._keys[idempotency_key]
        standing = self._runs[run_id].status
        if standing.spec.identity() != spec.identity():
            raise ConflictError.of_key(idempotency_key, run_id)
        return standing

    async def set_run_state(self, run_id: str, state: RunState) -> bool:
        """See ``Ledger.set_run_state``."""
        run = self._runs.get(run_id)
        if run is None or run.status.state in _FINAL:
            return False
        opened_at = self._clock() if state is RunState.OPEN else run.status.opened_at
        run.status = run.status.model_copy(update={"state": state, "opened_at": opened_at})
        return True

    async def forget_run(self, run_id: str) -> None:
        """See ``Ledger.forget_run``."""
        if run := self._runs.pop(run_id, None):
            self._keys.pop(run.key, None)
            self._count_gone(run.status)
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
        tickets = [first_ticket(run_id, group) for group in groups]
        if run.status.cursor != cursor:
            return tickets if run.status.cursor == next_cursor else []
        now = self._clock()
        for group, ticket in zip(groups, tickets, strict=True):
            samples = {sample: KeptSample(since=now) for sample in group.samples}
            run.groups[group.example_index] = KeptGroup(group.example, now, samples)
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
        if run is None:
            return None
        group = None if run.status.state in _FINAL else run.groups.get(ticket.example_index)
        now = self._clock()
        granted = []
        for index in ticket.samples:
            sample = group.samples.get(index) if group else None
            waiting = WAITING_STATE[ticket.stage], ticket.attempt
            if group is None or sample is None or (sample.state, sample.attempt) != waiting:
                continue
            sample.state = RUNNING_STATE[ticket.stage]
            sample.fence = fence = fence_of(ticket, index, worker)
            self._claims.setdefault(worker, {})[fence] = now + lease
            granted.append(
                ClaimedSample(
                    fence=fence,
                    accepted_at=group.accepted_at,
                    queued_at=sample.since,
                    failures=sample.failures,
                    payload=sample.payload,
                )
            )
        if not granted or group is None:
            run.count(dropped=1)
            return None
        if ticket.stage is Stage.GENERATE:
            run.count(queued=-len(granted))
        self._leases.setdefault(worker, (now, {}))
        generates = ticket.stage is Stage.GENERATE
        return Claim(
            example=group.example,
            samples=tuple(granted),
            claimed_at=now,
            opened_at=run.status.opened_at,
            weights=self._weights.get(run.status.spec.model) if generates else None,
        )

    async def commit(self, fence: Fence, outcome: Outcome, *, revoke: bool = False) -> Receipt:
        """See ``Ledger.commit``."""
        run, sample = self._find(fence.run_id, fence.example_index, fence.sample_index)
        self._claims.get(fence.worker, {}).pop(fence, None)
        if run is None or sample is None or sample.fence != fence:
            if run:
                run.count(refused=1)
            return Receipt(accepted=False)
        if revoke:
            self._revoked.setdefault(fence.worker, []).append(fence)
        sample.fence, sample.reason = None, ""
        now = self._clock()
        match outcome:
            case Generated(payload=payload):
                ticket = next_ticket(fence, Stage.VERIFY, 1)
                sample.state, sample.attempt, sample.failures = RolloutState.VERIFY_QUEUED, 1, 0
                sample.since, sample.payload = now, payload
                self._waiting[ticket] = now
                return Receipt(accepted=True, ticket=ticket)
            case Ended():
                await self._end(run, sample, outcome)
                return Receipt(accepted=True)
            case Retry(delay=delay, counted=counted, lost=lost, reason=reason):
                sample.state, sample.since = WAITING_STATE[fence.stage], now + delay
                sample.attempt += 1
                sample.failures += counted
                sample.reason = kept_reason(reason)
                run.count(retried=int(counted), lost=int(lost), queued=int(fence.stage is Stage.GENERATE))
                ticket = next_ticket(fence, fence.stage, sample.attempt, fence.losses + lost)
                if delay > 0:
                    self._delayed[ticket] = now + delay
                    return Receipt(accepted=True)
                self._waiting[ticket] = now
                return Receipt(accepted=True, ticket=ticket)

    async def _end(self, run: KeptRun, sample: KeptSample, ended: Ended) -> None:
        summary = ended.summary
        run.position += 1
        run.results[run.position] = Event(position=str(run.position), summary=summary, row=ended.row)
        run.count(**{summary.state: 1})
        self._count_end(run.status.spec.run_id, summary)
        group = run.groups[summary.example_index]
        ending = KeptSample(since=group.accepted_at, state=RolloutState(summary.state), attempt=0)
        group.samples[summary.sample_index] = ending
        if all(sample.state in TERMINAL for sample in group.samples.values()):
            del run.groups[summary.example_index]
        async with self._changed:
            self._changed.notify_all()

    async def end(self, run_id: str, ended: Ended, *, waiting_attempt: int | None = None) -> bool:
        """See ``Ledger.end``."""
        index, number = ended.summary.example_index, ended.summary.sample_index
        run, sample = self._find(run_id, index, number)
        if run is None or sample is None or sample.state in TERMINAL:
            return False
        if waiting_attempt is not None and (sample.fence or sample.attempt != waiting_attempt):
            return False
        if fence := sample.fence:
            self._claims[fence.worker].pop(fence, None)
            self._revoked.setdefault(fence.worker, []).append(fence)
        run.count(queued=-int(sample.state is RolloutState.QUEUED))
        await self._end(run, sample, ended)
        return True

    async def revoked(self, worker: str, limit: int) -> list[Fence]:
        """See ``Ledger.revoked``."""
        told = self._revoked.pop(worker, [])
        self._revoked |= {worker: told[limit:]} if told[limit:] else {}
        return told[:limit]

    async def count_republished(self, run_id: str, tickets: int) -> None:
        """See ``Ledger.count_republished``."""
        if run := self._runs.get(run_id):
            run.count(republished=tickets)

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
        due = [ticket for ticket, at in self._delayed.items() if at <= now]
        due = sorted(due, key=self._delayed.__getitem__)[:limit]
        for ticket in due:
            del self._delayed[ticket]
            self._waiting[ticket] = now
        return due

    async def heartbeat(self, worker: str, info: dict[str, str]) -> bool:
        """See ``Ledger.heartbeat``."""
        known = worker in self._leases
        self._leases[worker] = (self._clock(), {"worker": worker} | info)
        return known

    async def drop_lease(self, worker: str) -> None:
        """See ``Ledger.drop_lease``."""
        if not self._claims.get(worker):
            self._leases.pop(worker, None)
            self._claims.pop(worker, None)
            self._forget_probes(worker)

    async def announce(self, weights: Weights) -> bool:
        """See ``Ledger.announce``."""
        known = self._weights.get(weights.model)
        if known and known.version >= weights.version:
            return False
        self._weights[weights.model] = weights
        return True

    async def lead(self, office: str, holder: str, term: float) -> bool:
        """See ``Ledger.lead``."""
        now = self._clock()
        standing, until = self._offices.get(office, (holder, now))
        if standing != holder and now < until:
            return False
        self._offices[office] = holder, now + term
        return True

    async def resign(self, office: str, holder: str) -> None:
        """See ``Ledger.resign``."""
        if self._offices.get(office, ("", 0.0))[0] == holder:
            del self._offices[office]

    async def close(self) -> None:
        """Nothing to close."""
