"""The ledger on Redis (6.2 or newer): each atomic step is one Lua script in ``lua/``.

Calls made by coroutines of one event loop at the same time share a round trip: while one batch is under way,
the next collects. How tickets, claims and samples are spelled is in ``members``; the keys are in ``names``.
"""

from __future__ import annotations

import secrets
from collections import Counter
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any

from gym_queue import names
from gym_queue.census import FAILURE, LASTING, PASSING, Census, Line, totals_of
from gym_queue.errors import ConflictError, LedgerError
from gym_queue.ledger import members
from gym_queue.ledger.base import (
    SERVER,
    Claim,
    ClaimedSample,
    Ended,
    Generated,
    Outcome,
    Receipt,
    Retry,
    fence_of,
    first_ticket,
    kept_reason,
    next_ticket,
)
from gym_queue.ledger.edge import at_the_edge
from gym_queue.ledger.scripts import Scripts
from gym_queue.ledger.views import RUN_FIELDS, RedisViews, run_status
from gym_queue.lifecycle import RUNNING_STATE, WAITING_STATE
from gym_queue.records import Example, Fence, RunSpec, RunState, RunStatus, Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.records import Group, Summary, Ticket, Weights

_TOLD_FOR = 3600
"""Seconds that a worker has to read what was taken from it."""

_WRITTEN, _REFUSED = Receipt(accepted=True), Receipt(accepted=False)


class RedisLedger(RedisViews):
    """``gym_queue.ledger.base.Ledger`` on Redis. Bound to the event loop that first uses it.

    A ledger that is not ``patient`` is for callers who must not be held up: it gives up after two seconds.
    """

    def __init__(self, url: str, *, patient: bool = True) -> None:
        super().__init__(url, patient=patient)
        self._scripts = Scripts(self._edge)
        self._nonces = count(secrets.randbits(32))  # no two alike, without a system call for each

    def _nonce(self) -> str:
        return f"{next(self._nonces):x}"

    async def _run_script(self, name: str, keys: Sequence[str], *args: Any) -> Any:
        return await self._scripts.run(name, keys, args)

    async def open_run(self, spec: RunSpec, idempotency_key: str) -> RunStatus:
        """See ``Ledger.open_run``."""
        keys = [names.idempotency_key(idempotency_key), names.run_key(spec.run_id), names.runs_key()]
        args: list[Any] = [spec.run_id, spec.model_dump_json(), -spec.priority, idempotency_key, spec.model]
        answer = await self._run_script("open_run", keys, *args, names.run_key(""), *RUN_FIELDS)
        if answer is None:
            msg = f"run {spec.run_id} was submitted under another idempotency key"
            raise ConflictError(msg)
        standing = run_status(answer)
        if standing is None:
            msg = f"the run under idempotency key {idempotency_key!r} vanished from the ledger"
            raise LedgerError(msg)
        if standing.spec.identity() != spec.identity():
            raise ConflictError.of_key(idempotency_key, standing.spec.run_id)
        return standing

    async def runs(self) -> list[RunStatus]:
        """See ``Ledger.runs``."""
        found = await self._run_script("runs", [names.runs_key()], names.run_key(""), *RUN_FIELDS)
        return [status for fields in found if (status := run_status(fields)) is not None]

    async def set_run_state(self, run_id: str, state: RunState) -> bool:
        """See ``Ledger.set_run_state``."""
        return bool(await self._run_script("set_run_state", [names.run_key(run_id)], state.value))

    async def forget_run(self, run_id: str) -> None:
        """See ``Ledger.forget_run``. Its tickets stand in lines shared with other runs and go last; a claim
        that comes first finds no run.
        """
        keys = [
            names.run_key(run_id),
            names.runs_key(),
            names.groups_key(run_id),
            names.results_key(run_id),
            names.totals_key(),
        ]
        prefixes = names.idempotency_key(""), names.groups_prefix(run_id)
        await self._run_script("forget_run", keys, run_id, *prefixes, *LASTING)
        await self._drop_tickets(run_id)

    @at_the_edge
    async def _drop_tickets(self, run_id: str) -> None:
        for tickets in (*map(names.waiting_key, Stage), names.delayed_key()):
            stale = [
                member
                async for member, _ in self._client.zscan_iter(tickets, count=1000)
                if members.decode(member).run_id == run_id
            ]
            if stale:
                await self._client.zrem(tickets, *stale)

    async def accept(
        self, run_id: str, cursor: int, next_cursor: int, groups: Sequence[Group]
    ) -> list[Ticket]:
        """See ``Ledger.accept``."""
        keys = [names.run_key(run_id), names.waiting_key(Stage.GENERATE), names.groups_key(run_id)]
        args: list[Any] = [cursor, next_cursor]
        tickets = []
        for group in groups:
            tickets.append(first_ticket(run_id, group))
            keys.append(names.group_key(run_id, group.example_index))
            args += [group.example_index, ",".join(map(str, group.samples))]
            args += [group.example.model_dump_json(), members.encode(tickets[-1])]
        return tickets if await self._run_script("accept", keys, *args) else []

    async def claim(self, ticket: Ticket, worker: str, lease: float) -> Claim | None:
        """See ``Ledger.claim``."""
        stage, run_id = ticket.stage, ticket.run_id
        keys = [
            names.run_key(run_id),
            names.group_key(run_id, ticket.example_index),
            names.waiting_key(stage),
            names.claims_key(worker),
            names.leases_key(),
            names.weights_key(),
        ]
        args: list[Any] = [WAITING_STATE[stage].value, RUNNING_STATE[stage].value, ticket.attempt, worker]
        args += [self._nonce(), lease, members.encode(ticket), ticket.losses]
        fences = {sample: fence_of(ticket, sample, worker) for sample in ticket.samples}
        for sample, fence in fences.items():
            args += [sample, members.claim(fence)]
        answer = await self._run_script("claim", keys, *args)
        if answer is None:
            return None
        now, opened_at, example, accepted_at, model, weights, *granted = answer
        samples = tuple(
            ClaimedSample(
                fence=fences[int(sample)],
                accepted_at=float(accepted_at),
                queued_at=float(since),
                failures=int(failures),
                payload=payload or None,
            )
            for sample, since, failures, payload in granted
        )
        return Claim(
            example=Example.model_validate_json(example),
            samples=samples,
            claimed_at=float(now),
            opened_at=float(opened_at),
            weights=members.weights(model.decode(), weights) if weights else None,
        )

    async def commit(self, fence: Fence, outcome: Outcome, *, revoke: bool = False) -> Receipt:
        """See ``Ledger.commit``."""
        run_id, index = fence.run_id, fence.example_index
        ticket: Ticket | None = None
        own: list[Any] = [fence.sample_index, members.claim(fence), self._nonce()]
        match outcome:
            case Generated(payload=payload):
                ticket = next_ticket(fence, Stage.VERIFY, 1)
                kind, own = "generated", [*own, payload, members.encode(ticket)]
            case Ended(summary=summary, row=row):
                said, usage = summary.model_dump_json(exclude_defaults=True), summary.usage
                kind, own = "ended", [*own, summary.state, said, row]
                own += [_counter(summary), usage.prompt_tokens, usage.completion_tokens]
            case Retry(delay=delay, counted=counted, lost=lost, reason=reason):
                follower = next_ticket(fence, fence.stage, fence.attempt + 1, fence.losses + lost)
                kind, own = "retry", [*own, delay, int(counted), members.encode(follower), int(lost)]
                own.append(kept_reason(reason))
                ticket = follower if delay == 0 else None
        told_for = _TOLD_FOR if revoke else 0
        shared = [kind, fence.stage.value, index, fence.attempt, fence.worker, told_for]
        keys = _commit_keys(run_id, index, fence.worker)
        if not await self._scripts.run_merged("commit", keys, shared, own):
            return _REFUSED
        return Receipt(accepted=True, ticket=ticket) if ticket else _WRITTEN

    async def end(self, run_id: str, ended: Ended, *, waiting_attempt: int | None = None) -> bool:
        """See ``Ledger.end``."""
        summary = ended.summary
        keys = [
            names.run_key(run_id),
            names.group_key(run_id, summary.example_index),
            names.groups_key(run_id),
            names.results_key(run_id),
        ]
        args: list[Any] = [run_id, summary.example_index, summary.sample_index, summary.state]
        args += [summary.model_dump_json(exclude_defaults=True), ended.row]
        args += ["" if waiting_attempt is None else waiting_attempt]
        args += [names.claims_key(""), names.revoked_key(""), _TOLD_FOR, _counter(summary)]
        return bool(await self._run_script("end", keys, *args))

    @at_the_edge
    async def revoked(self, worker: str, limit: int) -> list[Fence]:
        """See ``Ledger.revoked``."""
        claims = await self._client.lpop(names.revoked_key(worker), limit)
        tickets = [members.decode(claim) for claim in claims or ()]
        return [fence_of(ticket, ticket.samples[0], worker) for ticket in tickets]

    async def count_republished(self, run_id: str, tickets: int) -> None:
        """See ``Ledger.count_republished``."""
        await self._run_script("count_republished", [names.run_key(run_id)], tickets)

    async def acknowledge(self, run_id: str, position: str) -> int:
        """See ``Ledger.acknowledge``."""
        milliseconds, sequence = position.split("-")
        keys = [names.run_key(run_id), names.results_key(run_id)]
        first_kept = f"{milliseconds}-{int(sequence) + 1}"
        return int(await self._run_script("acknowledge", keys, first_kept))

    async def promote_due(self, limit: int) -> list[Ticket]:
        """See ``Ledger.promote_due``."""
        keys = [names.delayed_key(), names.waiting_key(Stage.GENERATE), names.waiting_key(Stage.VERIFY)]
        return [members.decode(member) for member in await self._run_script("promote_due", keys, limit)]

    async def heartbeat(self, worker: str, info: dict[str, str]) -> bool:
        """See ``Ledger.heartbeat``."""
        keys = [names.leases_key(), names.worker_key(worker)]
        said = [part for item in ({"worker": worker} | info).items() for part in item]
        return bool(await self._run_script("heartbeat", keys, worker, *said))

    async def drop_lease(self, worker: str) -> None:
        """See ``Ledger.drop_lease``."""
        keys = [names.leases_key(), names.worker_key(worker), names.claims_key(worker)]
        keys += [names.probes_key(), names.round_trips_key()]
        await self._run_script("drop_lease", keys, worker)

    async def probe(self) -> int:
        """See ``Ledger.probe``."""
        keys = [names.leases_key(), names.probes_key()]
        return int(await self._run_script("probe", keys, names.worker_key(""), SERVER))

    async def answer_probe(self, worker: str) -> bool:
        """See ``Ledger.answer_probe``."""
        keys = [names.probes_key(), names.round_trips_key()]
        return bool(await self._run_script("answer_probe", keys, worker))

    async def census(self) -> Census:
        """See ``Ledger.census``."""
        keys = [names.runs_key(), names.totals_key(), *map(names.waiting_key, Stage), names.delayed_key()]
        counters = (*LASTING, *PASSING)
        answer = await self._run_script("census", keys, names.run_key(""), *counters)
        now, gone, there, states, delayed, *lines = answer
        sums = dict(zip(counters, there, strict=True))
        ended = sums["succeeded"] + sums["failed"] + sums["cancelled"]
        return Census(
            totals=totals_of({name: sums[name] + was for name, was in zip(counters, gone, strict=True)}),
            runs=Counter(RunState(state.decode()) for state in states),
            queued=sums["queued"],
            in_flight=sums["accepted"] - ended - sums["queued"],
            unarchived=ended - sums["archived"],
            delayed=delayed,
            waiting={
                stage: Line(tickets=tickets, oldest=max(0.0, float(now) - float(since)) if since else 0.0)
                for stage, tickets, since in zip(Stage, lines[::2], lines[1::2], strict=True)
            },
        )

    async def lead(self, office: str, holder: str, term: float) -> bool:
        """See ``Ledger.lead``."""
        milliseconds = max(1, round(term * 1000))
        return bool(await self._run_script("lead", [names.office_key(office)], holder, milliseconds))

    async def resign(self, office: str, holder: str) -> None:
        """See ``Ledger.resign``."""
        await self._run_script("resign", [names.office_key(office)], holder)

    async def announce(self, weights: Weights) -> bool:
        """See ``Ledger.announce``."""
        said = weights.model, weights.version, self._nonce(), weights.uri
        return bool(await self._run_script("announce", [names.weights_key()], *said))

    async def close(self) -> None:
        """See ``Ledger.close``."""
        await self._edge.close()


@lru_cache(maxsize=1024)
def _commit_keys(run_id: str, index: int, worker: str) -> tuple[str, ...]:
    """Return the keys of a commit. All samples of an example have the same."""
    return (
        names.run_key(run_id),
        names.group_key(run_id, index),
        names.claims_key(worker),
        names.waiting_key(Stage.GENERATE),
        names.waiting_key(Stage.VERIFY),
        names.delayed_key(),
        names.groups_key(run_id),
        names.results_key(run_id),
        names.revoked_key(worker),
        names.written_key(worker),
    )


def _counter(summary: Summary) -> str:
    """Return the counter of a failure's class; empty where nothing failed."""
    return f"{FAILURE}{summary.failure_class}" if summary.failure_class else ""
