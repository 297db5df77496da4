"""What the ledger on Redis shows: the methods that look and move nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gym_queue import names
from gym_queue.ledger import members
from gym_queue.ledger.base import Event, Lease, OpenRollout, OwnedAttempt, Whereabouts, fence_of
from gym_queue.ledger.connection import IMPATIENT, PATIENT
from gym_queue.ledger.edge import Edge, at_the_edge
from gym_queue.lifecycle import RUNNING_STATE, TERMINAL, WAITING_STATE
from gym_queue.records import Example, RunSpec, RunState, RunStatus, Stage, Summary

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gym_queue.records import Fence, Ticket, Weights

_COUNTERS = tuple(name for name in RunStatus.model_fields if name not in ("spec", "state", "opened_at"))

RUN_FIELDS = ("spec", "state", "opened", *_COUNTERS)
"""Fields of a run's record, as ``run_status`` reads them."""

_STAGE_OF_STATE = {state: stage for stage in Stage for state in (WAITING_STATE[stage], RUNNING_STATE[stage])}

_BATCH = 256
"""Groups or claims read in one round trip."""


def seconds(time: Sequence[int]) -> float:
    """Read the answer of TIME."""
    return time[0] + time[1] / 1e6


def _batches(some: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (some[start : start + _BATCH] for start in range(0, len(some), _BATCH))


def run_status(fields: Sequence[bytes | None]) -> RunStatus | None:
    """Read the ``RUN_FIELDS`` of a run; ``None`` if there is no such run."""
    spec, state, opened, *counters = fields
    if spec is None or state is None or opened is None:
        return None
    values = {name: int(value or 0) for name, value in zip(_COUNTERS, counters, strict=True)}
    return RunStatus(
        spec=RunSpec.model_validate_json(spec),
        state=RunState(state.decode()),
        opened_at=float(opened),
        **values,
    )


def _round_trip(taken: bytes | None, asked: bytes | None, now: float) -> float | None:
    """Return how long a worker's last probe took, or the one that is on its way has, if that is more."""
    known = [float(taken)] if taken else []
    return max(known + ([now - float(asked)] if asked else []), default=None)


class RedisViews:
    """The reading half of ``gym_queue.ledger.redis.RedisLedger``."""

    def __init__(self, url: str, *, patient: bool = True) -> None:
        self._edge = Edge(url, PATIENT if patient else IMPATIENT)
        self._client = self._edge.client

    @at_the_edge
    async def run(self, run_id: str) -> RunStatus | None:
        """See ``Ledger.run``."""
        return run_status(await self._client.hmget(names.run_key(run_id), *RUN_FIELDS))

    @at_the_edge
    async def open_rollouts(
        self, run_id: str, limit: int, examples: Sequence[int] | None = None
    ) -> list[OpenRollout]:
        """See ``Ledger.open_rollouts``."""
        found: list[OpenRollout] = []
        if examples is None:
            examples = await self._client.zrange(names.groups_key(run_id), 0, limit - 1)
        for batch in _batches(sorted(map(int, examples))):
            if len(found) < limit:
                found += await self._open_rollouts(run_id, batch)
        return found[:limit]

    async def _open_rollouts(self, run_id: str, indices: Sequence[int]) -> list[OpenRollout]:
        """Read some groups, but for their payloads: those may be large."""
        keys = [names.group_key(run_id, index) for index in indices]
        pipeline = self._client.pipeline(transaction=False)
        for key in keys:
            pipeline.hkeys(key)
        fields = [
            [b"example", b"at", *(name for name in known if name[:2] == b"s:")]
            for known in await pipeline.execute()
        ]
        for key, wanted in zip(keys, fields, strict=True):
            pipeline.hmget(key, wanted)
        pipeline.time()
        *groups, time = await pipeline.execute()
        found = []
        for index, wanted, (example, accepted_at, *records) in zip(indices, fields, groups, strict=True):
            standings = {
                int(name[2:]): members.standing(record)
                for name, record in zip(wanted[2:], records, strict=True)
                if record is not None  # gone meanwhile
            }
            found += [
                OpenRollout(
                    example=Example.model_validate_json(example),
                    example_index=index,
                    sample_index=sample,
                    accepted_at=float(accepted_at),
                    seen_at=seconds(time),
                    state=standing.state,
                    attempt=standing.attempt,
                    since=standing.since,
                )
                for sample, standing in sorted(standings.items())
                if standing.state not in TERMINAL
            ]
        return found

    @at_the_edge
    async def whereabouts(self, run_id: str, example_index: int, sample_index: int) -> Whereabouts | None:
        """See ``Ledger.whereabouts``."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.time()
        pipeline.hmget(names.group_key(run_id, example_index), f"s:{sample_index}", f"e:{sample_index}", "at")
        time, (record, reason, accepted_at) = await pipeline.execute()
        if record is None:
            return None
        standing = members.standing(record)
        stage = _STAGE_OF_STATE.get(standing.state)
        ahead, deadline = 0, None
        if stage is not None and standing.state is WAITING_STATE[stage]:
            ahead = await self._client.zcount(names.waiting_key(stage), "-inf", f"({standing.since!r}")
        elif stage is not None:
            claim = members.spell(
                stage, run_id, example_index, standing.attempt, sample_index, standing.losses
            )
            deadline = await self._client.zscore(names.claims_key(standing.worker), claim)
        return Whereabouts(
            state=standing.state,
            attempt=standing.attempt,
            failures=standing.failures,
            accepted_at=float(accepted_at),
            seen_at=seconds(time),
            since=standing.since or float(accepted_at),
            worker=standing.worker,
            deadline=deadline,
            ahead=ahead,
            reason=(reason or b"").decode(),
        )

    @at_the_edge
    async def events(self, run_id: str, after: str, limit: int, wait: float) -> list[Event]:
        """See ``Ledger.events``."""
        stream = {names.results_key(run_id): after or "0-0"}
        block = max(1, int(min(wait, self._edge.patience.block) * 1000)) if wait > 0 else None
        answer = await self._client.xread(stream, count=limit, block=block)
        if not answer:
            return []
        entries = answer[0][1] if isinstance(answer, list) else next(iter(answer.values()))[0]
        return [
            Event(
                position=position.decode(),
                summary=Summary.model_validate_json(fields[b"s"]),
                row=fields[b"r"],
            )
            for position, fields in entries
        ]

    @at_the_edge
    async def waiting(self, stage: Stage, older_than: float, limit: int) -> tuple[int, list[Ticket]]:
        """See ``Ledger.waiting``."""
        key = names.waiting_key(stage)
        newest = seconds(await self._client.time()) - older_than
        count = await self._client.zcard(key)
        old = await self._client.zrangebyscore(key, "-inf", newest, start=0, num=limit)
        return int(count), [members.decode(member) for member in old]

    @at_the_edge
    async def leases(self) -> list[Lease]:
        """See ``Ledger.leases``."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.time()
        pipeline.zrange(names.leases_key(), 0, -1, withscores=True)
        pipeline.hgetall(names.probes_key())
        pipeline.hgetall(names.round_trips_key())
        time, beats, asked, taken = await pipeline.execute()
        for worker, _ in beats:
            pipeline.hgetall(names.worker_key(worker.decode()))
        infos = await pipeline.execute()
        return [
            Lease(
                worker=worker.decode(),
                age=max(0.0, seconds(time) - beat),
                info={field.decode(): value.decode() for field, value in info.items()},
                round_trip=_round_trip(taken.get(worker), asked.get(worker), seconds(time)),
            )
            for (worker, beat), info in zip(beats, infos, strict=True)
        ]

    @at_the_edge
    async def owned(self, worker: str, overdue_by: float | None, limit: int) -> list[OwnedAttempt]:
        """See ``Ledger.owned``."""
        found = []
        now = seconds(await self._client.time())
        newest = "+inf" if overdue_by is None else now - overdue_by
        claims = await self._client.zrangebyscore(
            names.claims_key(worker), "-inf", newest, start=0, num=limit
        )
        for batch in _batches(claims):
            found += await self._owned(worker, batch, now)
        return found

    @at_the_edge
    async def claimed(self, worker: str, limit: int) -> list[Fence]:
        """See ``Ledger.claimed``."""
        claims = await self._client.zrange(names.claims_key(worker), 0, limit - 1)
        tickets = [members.decode(claim) for claim in claims]
        return [fence_of(ticket, ticket.samples[0], worker) for ticket in tickets]

    async def _owned(self, worker: str, claims: Sequence[bytes], now: float) -> list[OwnedAttempt]:
        """Read some claims. One that its record no longer knows (cancelled, fenced, forgotten) is dropped."""
        pipeline = self._client.pipeline(transaction=False)
        tickets = [members.decode(claim) for claim in claims]
        for ticket in tickets:
            (sample,) = ticket.samples
            key = names.group_key(ticket.run_id, ticket.example_index)
            pipeline.hmget(key, "example", "at", f"s:{sample}", f"p:{sample}")
        found, stale = [], []
        for claim, ticket, (example, accepted_at, record, payload) in zip(
            claims, tickets, await pipeline.execute(), strict=True
        ):
            standing = members.standing(record) if record else None
            held = standing and (standing.state, standing.attempt, standing.worker)
            if standing is None or held != (RUNNING_STATE[ticket.stage], ticket.attempt, worker):
                stale.append(claim)
                continue
            found.append(
                OwnedAttempt(
                    fence=fence_of(ticket, ticket.samples[0], worker),
                    example=Example.model_validate_json(example),
                    accepted_at=float(accepted_at),
                    seen_at=now,
                    failures=standing.failures,
                    payload=payload,
                )
            )
        if stale:
            await self._client.zrem(names.claims_key(worker), *stale)
        return found

    @at_the_edge
    async def weights(self, model: str) -> Weights | None:
        """See ``Ledger.weights``."""
        known = await self._client.hget(names.weights_key(), model)
        return members.weights(model, known) if known else None
