"""What a worker leaves behind when it stops, writes late, or finds ledger or broker away; many at once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.engines.stub import StubEngine, StubOptions
from gym_queue.errors import LedgerError, ModelError
from gym_queue.ledger.base import Retry
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.records import Stage
from gym_queue.testing import async_wait_until
from tests.unit.road import RUN, Engine, Gate, Road, World, group

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gym_queue.engines.base import Completion
    from gym_queue.ledger.base import Claim, Outcome, Receipt
    from gym_queue.records import Fence, Message, RunStatus, Ticket


async def test_cancelled_work_is_handed_back_and_counts_as_nobodys_failure() -> None:
    gate, stopped = Gate(), []

    async def act() -> None:
        try:
            await gate()
        except asyncio.CancelledError:
            stopped.append("engine")
            raise

    road = Road(engine=Engine(act))
    (ticket,) = await road.submit(group(0))
    task = asyncio.create_task(road.pipeline.generate(ticket))
    await async_wait_until(lambda: gate.waiting == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stopped == ["engine"] * 2
    assert [(t.samples, t.attempt) for t in road.publisher.tickets] == [((0,), 2), ((1,), 2)]
    status = await road.ledger.run(RUN)
    assert status is not None
    assert (status.retried, status.ended) == (0, 0)
    assert await road.ledger.owned("gpu", None, 10) == []
    gate.open()
    await road.work(*road.publisher.take())
    assert [row["attempt"] for row in await road.rows()] == [2, 2]


class LossyLedger(MemoryLedger):
    """Does what it is asked but loses its answer, or does not even do it; as often as told."""

    def __init__(self) -> None:
        super().__init__()
        self.lost_claims = 0
        self.lost_commits = 0
        self.refusals = 0
        self.reads = 0
        self.holding: Gate | None = None
        self.claimed_then: Callable[[], object] | None = None

    async def run(self, run_id: str) -> RunStatus | None:
        self.reads += 1
        return await super().run(run_id)

    async def claim(self, ticket: Ticket, worker: str, lease: float) -> Claim | None:
        claim = await super().claim(ticket, worker, lease)
        if self.holding:
            await self.holding()
        if self.claimed_then:
            self.claimed_then()
        if self.lost_claims:
            self.lost_claims -= 1
            raise LedgerError
        return claim

    async def commit(self, fence: Fence, outcome: Outcome, *, revoke: bool = False) -> Receipt:
        if self.refusals:
            self.refusals -= 1
            raise LedgerError
        receipt = await super().commit(fence, outcome)
        if self.lost_commits:
            self.lost_commits -= 1
            raise LedgerError
        return receipt


async def test_a_claim_whose_answer_is_lost_is_handed_back() -> None:
    """Else nobody works on it, and at its deadline it would pass for a rollout that took too long."""
    ledger = LossyLedger()
    road = Road(ledger=ledger)
    (ticket,) = await road.submit(group(0))
    ledger.lost_claims = 1
    await road.pipeline.generate(ticket)  # which is no failure of the task
    assert await ledger.owned("gpu", None, 10) == []
    assert [(t.samples, t.attempt) for t in road.publisher.tickets] == [((0,), 2), ((1,), 2)]
    await road.work(*road.publisher.take())
    assert [row["state"] for row in await road.rows()] == ["succeeded"] * 2


async def test_work_cancelled_while_it_is_claimed_is_handed_back() -> None:
    ledger = LossyLedger()
    road = Road(ledger=ledger)
    (ticket,) = await road.submit(group(0))
    ledger.holding = Gate()
    task = asyncio.create_task(road.pipeline.generate(ticket))
    await async_wait_until(lambda: ledger.holding and ledger.holding.waiting)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await ledger.owned("gpu", None, 10) == []
    assert len(road.publisher.tickets) == 2


@pytest.mark.parametrize("at_once", [True, False])
async def test_work_cancelled_before_its_samples_begin_is_handed_back(*, at_once: bool) -> None:
    ledger = LossyLedger()
    road = Road(ledger=ledger, engine=Engine(Gate()))
    (ticket,) = await road.submit(group(0))
    task = asyncio.create_task(road.pipeline.generate(ticket))
    loop = asyncio.get_running_loop()
    # Not at once: before the first step of whatever is begun next.
    ledger.claimed_then = task.cancel if at_once else lambda: loop.call_soon(task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await ledger.owned("gpu", None, 10) == []
    assert [(t.samples, t.attempt) for t in road.publisher.tickets] == [((0,), 2), ((1,), 2)]
    found = await ledger.whereabouts(RUN, 0, 0)
    assert found is not None
    assert found.reason == "worker gpu stopped and handed it back"


@pytest.mark.parametrize("lost", ["refusals", "lost_commits"])
async def test_a_ledger_that_is_away_is_waited_for(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_queue.pipeline.random.random", lambda: 0.0)
    ledger = LossyLedger()
    road = Road(ledger=ledger)
    tickets = await road.submit(group(0, [0]))
    setattr(ledger, lost, 3)
    await road.work(*tickets)
    (row,) = await road.rows()
    assert row["state"] == "succeeded"


async def test_a_late_write_publishes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    road = Road(World(inline=False), engine=Engine(gate))
    (ticket,) = await road.submit(group(0, [0]))
    task = asyncio.create_task(road.pipeline.generate(ticket))
    await async_wait_until(lambda: gate.waiting)
    (owned,) = await road.ledger.owned("gpu", None, 10)
    await road.ledger.commit(owned.fence, Retry())  # the sweep thought it dead
    gate.open()
    await task
    assert road.publisher.tickets == []
    assert "late write refused" in caplog.text
    status = await road.ledger.run(RUN)
    assert status is not None
    assert status.refused == 1


async def test_a_ticket_that_grants_nothing_is_forgotten() -> None:
    road = Road(engine=Engine())
    (ticket,) = await road.submit(group(0))
    await road.work(ticket, ticket)
    assert road.engine.calls == 2  # type: ignore[attr-defined]
    assert len(await road.events()) == 2


async def test_a_ticket_of_a_forgotten_run_is_forgotten_by_the_ledger_too() -> None:
    """Such a ticket can be left by a commit that came between two steps of forgetting the run."""
    road = Road()
    (ticket,) = await road.submit(group(0))
    await road.ledger.forget_run(RUN)
    road.ledger._waiting[ticket] = 0.0  # type: ignore[attr-defined]
    await road.work(ticket)
    assert await road.ledger.waiting(Stage.GENERATE, 0, 10) == (0, [])
    again = await road.submit(group(0))
    await road.work(*again)  # a run of this name may come again
    assert len(await road.rows()) == 2


async def test_samples_of_a_ticket_run_side_by_side_and_end_on_their_own() -> None:
    gates = [Gate(), Gate(), Gate()]
    free = iter(gates)

    async def act() -> None:
        await next(free)()

    road = Road(engine=Engine(act))
    (ticket,) = await road.submit(group(0, [0, 1, 2]), samples=3)
    task = asyncio.create_task(road.pipeline.generate(ticket))
    await async_wait_until(lambda: all(gate.waiting for gate in gates))
    gates[1].open()
    await async_wait_until(road.events)
    assert [row["sample_index"] for row in await road.rows()] == [1]
    gates[0].open()
    gates[2].open()
    await task
    assert {row["sample_index"] for row in await road.rows()} == {0, 1, 2}


async def test_one_sample_that_fails_does_not_disturb_its_siblings() -> None:
    errors = iter([ModelError("refused"), None])

    async def act() -> None:
        if error := next(errors):
            raise error

    road = Road(engine=Engine(act))
    await road.work(*await road.submit(group(0)))
    assert sorted(row["state"] for row in await road.rows()) == ["failed", "succeeded"]


async def test_a_broker_that_is_away_is_no_failure_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    road = Road(World(inline=False))
    tickets = await road.submit(*(group(index) for index in range(3)))
    road.publisher.away = True
    for ticket in tickets[:2]:
        await road.pipeline.generate(ticket)
    assert (await road.ledger.waiting(Stage.VERIFY, 0, 10))[0] == 4  # the audit publishes them
    assert caplog.text.count("tickets are left to the audit") == 1
    road.publisher.away = False
    await road.pipeline.generate(tickets[2])
    assert len(road.publisher.tickets) == 2


async def test_a_runs_spec_is_read_once() -> None:
    ledger = LossyLedger()
    road = Road(ledger=ledger)
    tickets = await road.submit(*(group(index) for index in range(5)))
    await asyncio.gather(*(road.pipeline.generate(ticket) for ticket in tickets))
    assert ledger.reads == 1
    assert len(await road.events()) == 10


async def test_each_rollout_has_its_own_seed() -> None:
    seeds = []

    class Seeded(StubEngine):
        async def generate(self, messages: Sequence[Message], **options: Any) -> Completion:
            seeds.append(options["seed"])
            return await super().generate(messages, **options)

    road = Road(engine=Seeded(StubOptions()))
    await road.work(*await road.submit(group(0), group(1), sampling={"seed": 7}))
    assert seeds == [7, 8, 9, 10]
