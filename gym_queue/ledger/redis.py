"""The ledger on Redis (6.2 or newer): each atomic step is one Lua script in ``lua/``.

Calls made by coroutines of one event loop at the same time share a round trip: while one batch is under way,
the next collects. A sample's record is one hash field, ``state|attempt|failures|since|worker|nonce``; once
ended, just its state.
"""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import redis.asyncio as aioredis
from pydantic_core import from_json
from redis.asyncio.retry import Retry as ConnectionRetry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from gym_queue import names
from gym_queue.errors import REDIS_DISK_FULL, ConflictError, LedgerError, StorageError
from gym_queue.ledger import members
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
from gym_queue.ledger.scripts import Scripts
from gym_queue.lifecycle import RUNNING_STATE, WAITING_STATE, RolloutState
from gym_queue.records import Example, Fence, RunSpec, RunState, RunStatus, Stage, Summary, Ticket

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gym_queue.records import Group

_COUNTERS = (
    "cursor",
    "accepted",
    "succeeded",
    "failed",
    "cancelled",
    "archived",
    "retried",
    "refused",
    "queued",
)


_CONNECTIONS = 16
"""Enough for readers that wait beside writers; callers past that queue up for a connection."""


@contextmanager
def _translated() -> Iterator[None]:
    """Turn the driver's errors into ours, at the edge."""
    try:
        yield
    except RedisError as error:
        if "MISCONF" in str(error):
            raise StorageError(REDIS_DISK_FULL) from error
        msg = f"Redis: {error}"
        raise LedgerError(msg) from error


class RedisLedger:
    """``gym_queue.ledger.base.Ledger`` on Redis. Bound to the event loop that first uses it."""

    def __init__(self, url: str) -> None:
        retry = ConnectionRetry(ExponentialWithJitterBackoff(base=0.05, cap=2.0), retries=10)
        pool = aioredis.BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=None,
            retry=retry,
            retry_on_error=[RedisConnectionError],
        )
        # Any: redis-py's annotations mix str, bytes and None with no regard to decode_responses.
        self._client: Any = aioredis.Redis.from_pool(pool)
        self._scripts = Scripts(self._client)

    async def open_run(self, spec: RunSpec, idempotency_key: str) -> RunSpec:
        """See ``Ledger.open_run``."""
        keys = [names.idempotency_key(idempotency_key), names.run_key(spec.run_id), names.runs_key()]
        args = [spec.run_id, spec.model_dump_json(), -spec.priority, idempotency_key]
        with _translated():
            answer = await self._scripts.run("open_run", keys, args)
            if answer is None:
                msg = f"run {spec.run_id} was submitted under another idempotency key"
                raise ConflictError(msg)
            run_id = answer.decode()
            known = await self._client.hget(names.run_key(run_id), "spec")
        standing = RunSpec.model_validate_json(known) if known else spec
        if standing.identity() != spec.identity():
            msg = (
                f"idempotency key {idempotency_key!r} was used for run {run_id} with other input or settings"
            )
            raise ConflictError(msg)
        return standing

    async def run(self, run_id: str) -> RunStatus | None:
        """See ``Ledger.run``."""
        with _translated():
            spec, state, *counters = await self._client.hmget(
                names.run_key(run_id), "spec", "state", *_COUNTERS
            )
        if spec is None:
            return None
        values = {name: int(value or 0) for name, value in zip(_COUNTERS, counters, strict=True)}
        return RunStatus(spec=RunSpec.model_validate_json(spec), state=RunState(state.decode()), **values)

    async def runs(self) -> list[RunStatus]:
        """See ``Ledger.runs``."""
        with _translated():
            run_ids = await self._client.zrange(names.runs_key(), 0, -1)
        statuses = [await self.run(run_id.decode()) for run_id in run_ids]
        return [status for status in statuses if status is not None]

    async def set_run_state(self, run_id: str, state: RunState) -> bool:
        """See ``Ledger.set_run_state``."""
        with _translated():
            return bool(await self._scripts.run("set_run_state", [names.run_key(run_id)], [state.value]))

    async def forget_run(self, run_id: str) -> None:
        """See ``Ledger.forget_run``."""
        with _translated():
            key = await self._client.hget(names.run_key(run_id), "key")
            for tickets in (*map(names.waiting_key, Stage), names.delayed_key()):
                stale = [
                    member
                    async for member, _ in self._client.zscan_iter(tickets)
                    if members.decode(member).run_id == run_id
                ]
                if stale:
                    await self._client.zrem(tickets, *stale)
            groups = await self._client.zrange(names.groups_key(run_id), 0, -1)
            doomed = [names.group_key(run_id, int(index)) for index in groups]
            doomed += [names.groups_key(run_id), names.results_key(run_id), names.run_key(run_id)]
            if key:
                doomed.append(names.idempotency_key(key.decode()))
            await self._client.zrem(names.runs_key(), run_id)
            await self._client.delete(*doomed)

    async def accept(
        self, run_id: str, cursor: int, next_cursor: int, groups: Sequence[Group]
    ) -> list[Ticket]:
        """See ``Ledger.accept``."""
        keys = [names.run_key(run_id), names.waiting_key(Stage.GENERATE), names.groups_key(run_id)]
        args: list[Any] = [cursor, next_cursor]
        tickets = []
        for group in groups:
            ticket = Ticket(
                stage=Stage.GENERATE,
                run_id=run_id,
                example_index=group.example_index,
                samples=group.samples,
                attempt=1,
            )
            tickets.append(ticket)
            keys.append(names.group_key(run_id, group.example_index))
            args += [group.example_index, ",".join(map(str, group.samples))]
            args += [group.example.model_dump_json(), members.encode(ticket)]
        with _translated():
            return tickets if await self._scripts.run("accept", keys, args) else []

    async def claim(self, ticket: Ticket, worker: str, lease: float) -> Claim | None:
        """See ``Ledger.claim``."""
        stage, run_id, index = ticket.stage, ticket.run_id, ticket.example_index
        keys = [
            names.run_key(run_id),
            names.group_key(run_id, index),
            names.waiting_key(stage),
            names.claims_key(worker),
            names.leases_key(),
        ]
        args: list[Any] = [WAITING_STATE[stage].value, RUNNING_STATE[stage].value, ticket.attempt, worker]
        args += [secrets.token_hex(4), lease, members.encode(ticket)]
        for sample in ticket.samples:
            args += [sample, members.claim(stage, run_id, index, sample, ticket.attempt)]
        with _translated():
            answer = await self._scripts.run("claim", keys, args)
        if answer is None:
            return None
        now, example, accepted_at, *granted = answer
        samples = tuple(
            ClaimedSample(
                fence=fence_of(ticket, int(sample), worker),
                accepted_at=float(accepted_at),
                queued_at=float(since),
                failures=int(failures),
                payload=payload or None,
            )
            for sample, since, failures, payload in granted
        )
        return Claim(example=Example.model_validate_json(example), samples=samples, claimed_at=float(now))

    async def commit(self, fence: Fence, outcome: Outcome) -> Receipt:
        """See ``Ledger.commit``."""
        run_id, index = fence.run_id, fence.example_index
        member = members.claim(fence.stage, run_id, index, fence.sample_index, fence.attempt)
        ticket: Ticket | None = None
        args: list[Any] = [fence.stage.value, index, fence.sample_index, fence.attempt, fence.worker, member]
        match outcome:
            case Generated(payload=payload):
                ticket = next_ticket(fence, Stage.VERIFY, 1)
                args = ["generated", *args, payload, members.encode(ticket)]
            case Ended(summary=summary, row=row):
                args = ["ended", *args, summary.state, summary.model_dump_json(exclude_defaults=True), row]
            case Retry(delay=delay, counted=counted):
                follower = next_ticket(fence, fence.stage, fence.attempt + 1)
                args = ["retry", *args, delay, int(counted), members.encode(follower)]
                ticket = follower if delay == 0 else None
        keys = [
            names.run_key(run_id),
            names.group_key(run_id, index),
            names.claims_key(fence.worker),
            names.waiting_key(Stage.GENERATE),
            names.waiting_key(Stage.VERIFY),
            names.delayed_key(),
            names.groups_key(run_id),
            names.results_key(run_id),
        ]
        with _translated():
            accepted = bool(await self._scripts.run("commit", keys, args))
        return Receipt(accepted=accepted, ticket=ticket if accepted else None)

    async def cancel(
        self, run_id: str, example_index: int, sample_index: int, row: bytes, summary: Summary
    ) -> bool:
        """See ``Ledger.cancel``."""
        keys = [
            names.run_key(run_id),
            names.group_key(run_id, example_index),
            names.groups_key(run_id),
            names.results_key(run_id),
        ]
        args = [example_index, sample_index, summary.model_dump_json(exclude_defaults=True), row]
        with _translated():
            return bool(await self._scripts.run("cancel", keys, args))

    async def open_rollouts(self, run_id: str, limit: int) -> list[tuple[Example, int, int, float]]:
        """See ``Ledger.open_rollouts``."""
        found: list[tuple[Example, int, int, float]] = []
        with _translated():
            for index in await self._client.zrange(names.groups_key(run_id), 0, limit - 1):
                group = await self._client.hgetall(names.group_key(run_id, int(index)))
                samples = sorted(
                    int(field[2:]) for field, record in group.items() if field[:2] == b"s:" and b"|" in record
                )
                example = Example.model_validate_json(group[b"example"]) if samples else None
                found += [(example, int(index), sample, float(group[b"at"])) for sample in samples if example]
        return found[:limit]

    async def state_of(self, run_id: str, example_index: int, sample_index: int) -> RolloutState | None:
        """See ``Ledger.state_of``."""
        with _translated():
            record = await self._client.hget(names.group_key(run_id, example_index), f"s:{sample_index}")
        return RolloutState(record.decode().split("|", 1)[0]) if record else None

    async def events(self, run_id: str, after: str, limit: int, wait: float) -> list[Event]:
        """See ``Ledger.events``."""
        stream = {names.results_key(run_id): after or "0-0"}
        block = max(1, int(wait * 1000)) if wait > 0 else None
        with _translated():
            answer = await self._client.xread(stream, count=limit, block=block)
        if not answer:
            return []
        entries = answer[0][1] if isinstance(answer, list) else next(iter(answer.values()))[0]
        return [
            Event(
                position=position.decode(),
                summary=Summary.model_validate(from_json(fields[b"s"])),
                row=fields[b"r"],
            )
            for position, fields in entries
        ]

    async def acknowledge(self, run_id: str, position: str) -> int:
        """See ``Ledger.acknowledge``."""
        milliseconds, sequence = position.split("-")
        keys = [names.run_key(run_id), names.results_key(run_id)]
        with _translated():
            return int(await self._scripts.run("acknowledge", keys, [f"{milliseconds}-{int(sequence) + 1}"]))

    async def promote_due(self, limit: int) -> list[Ticket]:
        """See ``Ledger.promote_due``."""
        keys = [names.delayed_key(), names.waiting_key(Stage.GENERATE), names.waiting_key(Stage.VERIFY)]
        with _translated():
            return [
                members.decode(member) for member in await self._scripts.run("promote_due", keys, [limit])
            ]

    async def waiting(self, stage: Stage, older_than: float, limit: int) -> tuple[int, list[Ticket]]:
        """See ``Ledger.waiting``."""
        key = names.waiting_key(stage)
        with _translated():
            seconds, microseconds = await self._client.time()
            newest = seconds + microseconds / 1e6 - older_than
            count = await self._client.zcard(key)
            old = await self._client.zrangebyscore(key, "-inf", newest, start=0, num=limit)
        return int(count), [members.decode(member) for member in old]

    async def heartbeat(self, worker: str, info: dict[str, str]) -> bool:
        """See ``Ledger.heartbeat``."""
        keys = [names.leases_key(), names.worker_key(worker)]
        said = [part for item in ({"worker": worker} | info).items() for part in item]
        with _translated():
            return bool(await self._scripts.run("heartbeat", keys, [worker, *said]))

    async def leases(self) -> list[Lease]:
        """See ``Ledger.leases``."""
        with _translated():
            seconds, microseconds = await self._client.time()
            now = seconds + microseconds / 1e6
            found = []
            for worker, beat in await self._client.zrange(names.leases_key(), 0, -1, withscores=True):
                info = await self._client.hgetall(names.worker_key(worker.decode()))
                said = {field.decode(): value.decode() for field, value in info.items()}
                found.append(Lease(worker=worker.decode(), age=max(0.0, now - beat), info=said))
        return found

    async def owned(self, worker: str, overdue_by: float | None, limit: int) -> list[OwnedAttempt]:
        """See ``Ledger.owned``."""
        with _translated():
            seconds, microseconds = await self._client.time()
            now = seconds + microseconds / 1e6
            newest = "+inf" if overdue_by is None else now - overdue_by
            members = await self._client.zrangebyscore(
                names.claims_key(worker), "-inf", newest, start=0, num=limit
            )
            return [owned for member in members if (owned := await self._owned(worker, member, now))]

    async def _owned(self, worker: str, member: bytes, now: float) -> OwnedAttempt | None:
        """Read one claim; a claim that its record no longer knows (cancelled, fenced) is dropped."""
        claim = members.decode(member)
        (sample,) = claim.samples
        example, accepted_at, record, payload = await self._client.hmget(
            names.group_key(claim.run_id, claim.example_index), "example", "at", f"s:{sample}", f"p:{sample}"
        )
        said: list[str] = (record or b"").decode().split("|") + [""] * 5
        state, attempt, failures, _, owner = said[:5]
        if (state, attempt, owner) != (RUNNING_STATE[claim.stage].value, str(claim.attempt), worker):
            await self._client.zrem(names.claims_key(worker), member)
            return None
        fence = fence_of(claim, sample, worker)
        return OwnedAttempt(
            fence=fence,
            example=Example.model_validate_json(example),
            accepted_at=float(accepted_at),
            seen_at=now,
            failures=int(failures),
            payload=payload,
        )

    async def drop_lease(self, worker: str) -> None:
        """See ``Ledger.drop_lease``."""
        keys = [names.leases_key(), names.worker_key(worker), names.claims_key(worker)]
        with _translated():
            await self._scripts.run("drop_lease", keys, [worker])

    async def close(self) -> None:
        """See ``Ledger.close``."""
        with _translated():
            await self._client.aclose()
