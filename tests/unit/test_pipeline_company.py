"""What a worker lets go: attempts that are no longer its own, tickets that it holds already, bad company."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from gym_queue.ledger.base import Retry
from gym_queue.records import Limits, RunState, Stage
from gym_queue.testing import async_wait_until
from tests.unit.road import RUN, Engine, Gate, Road, group

if TYPE_CHECKING:
    import pytest

    from gym_queue.ledger.base import Ledger
    from gym_queue.records import Ticket


class Gates:
    """Holds each rollout at a gate of its own, in the order in which they come."""

    def __init__(self) -> None:
        self.gates: list[Gate] = []

    async def __call__(self) -> None:
        self.gates.append(Gate())
        await self.gates[-1]()

    def open(self) -> None:
        for gate in self.gates:
            gate.open()


async def lost_to(road: Road, ticket: Ticket, deaths: int) -> Ticket:
    """Let workers die with a ticket of one sample; return the next one."""
    for _ in range(deaths):
        claim = await road.ledger.claim(ticket, "victim", 60.0)
        assert claim is not None
        receipt = await road.ledger.commit(claim.samples[0].fence, Retry(lost=True, counted=False))
        assert receipt.ticket is not None
        ticket = receipt.ticket
    return ticket


async def test_what_was_taken_away_is_dropped_and_its_siblings_go_on(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gym_queue")
    gates = Gates()
    road = Road(engine=Engine(gates), ledger=ledger)
    (ticket,) = await road.submit(group(0))
    task = asyncio.create_task(road.pipeline.generate(ticket))
    await async_wait_until(lambda: len(gates.gates) == 2)
    first, second = [attempt.fence for attempt in await road.ledger.owned("gpu", None, 10)]
    await road.ledger.commit(first, Retry(), revoke=True)
    stranger = second.model_copy(update={"attempt": 7})
    assert road.pipeline.drop([*await road.ledger.revoked("gpu", 10), stranger]) == 1
    await async_wait_until(lambda: len(road.pipeline.running()) == 1)
    gates.open()
    await task  # which ends well
    assert [row["sample_index"] for row in await road.rows()] == [1]
    assert road.publisher.tickets == []  # nothing was handed back
    status = await road.ledger.run(RUN)
    assert status is not None
    assert status.refused == 0  # and nothing written
    assert [record.getMessage() for record in caplog.records] == ["dropped 1 rollouts: no longer ours"]
    assert road.pipeline.drop([first]) == 0


async def test_the_task_of_a_single_rollout_that_is_dropped_ends_well() -> None:
    gate = Gate()
    road = Road(engine=Engine(gate))
    (ticket,) = await road.submit(group(0, [0]))
    task = asyncio.create_task(road.pipeline.generate(ticket))
    await async_wait_until(lambda: gate.waiting)
    (owned,) = await road.ledger.owned("gpu", None, 10)
    assert road.pipeline.drop([owned.fence]) == 1
    await task
    assert await road.events() == []
    assert road.pipeline.running() == frozenset()
    assert len(await road.ledger.owned("gpu", None, 10)) == 1  # had it been ours, disown would see to it


async def test_suspects_run_few_at_a_time_and_unclaimed_until_then(ledger: Ledger) -> None:
    gates = Gates()
    road = Road(engine=Engine(gates), slots=4, ledger=ledger)
    tickets = await road.submit(*(group(index, [0]) for index in range(3)), limits=Limits(max_attempts=3))
    suspects = [await lost_to(road, ticket, 2) for ticket in tickets]
    tasks = [asyncio.create_task(road.pipeline.generate(ticket)) for ticket in suspects]
    await async_wait_until(lambda: len(gates.gates) == 2)
    assert len(await road.ledger.owned("gpu", None, 10)) == 2
    assert (await road.ledger.waiting(Stage.GENERATE, 0, 10))[0] == 1
    gates.open()
    await async_wait_until(lambda: len(gates.gates) == 3)
    gates.open()
    await asyncio.gather(*tasks)
    assert len(await road.rows()) == 3


async def test_who_must_be_alone_is_claimed_when_nothing_else_runs(ledger: Ledger) -> None:
    gates = Gates()
    road = Road(engine=Engine(gates), slots=4, ledger=ledger)
    early, bad, late = await road.submit(
        *(group(index, [0]) for index in range(3)), limits=Limits(max_attempts=3)
    )
    bad = await lost_to(road, bad, 3)
    tasks = [asyncio.create_task(road.pipeline.generate(ticket)) for ticket in (early, bad, late)]
    for index in (0, 1, 2):
        await async_wait_until(lambda: len(gates.gates) == index + 1)  # noqa: B023 - awaited here
        (owned,) = await road.ledger.owned("gpu", None, 10)
        assert owned.fence.example_index == index
        gates.open()
    await asyncio.gather(*tasks)
    assert len(await road.rows()) == 3


async def test_a_ticket_that_waits_here_already_is_forgotten() -> None:
    """The audit cannot see it, and publishes it again each time: it must not fill this worker's slots."""
    gates = Gates()
    road = Road(engine=Engine(gates), slots=4)
    early, bad = await road.submit(group(0, [0]), group(1, [0]), limits=Limits(max_attempts=3))
    bad = await lost_to(road, bad, 3)
    tasks = [asyncio.create_task(road.pipeline.generate(ticket)) for ticket in (early, bad)]
    await async_wait_until(lambda: gates.gates)
    await road.pipeline.generate(bad.model_copy())  # returns
    await road.pipeline.generate(early.model_copy())
    assert (await road.ledger.waiting(Stage.GENERATE, 0, 10))[0] == 1
    gates.open()
    await async_wait_until(lambda: len(gates.gates) == 2)
    gates.open()
    await asyncio.gather(*tasks)
    assert len(await road.rows()) == 2


async def test_a_ticket_that_was_refused_once_may_come_again() -> None:
    road = Road()
    (ticket,) = await road.submit(group(0, [0]))
    await road.ledger.set_run_state(RUN, RunState.PAUSED)
    await road.pipeline.generate(ticket)
    assert road.pipeline.running() == frozenset()
    await road.ledger.set_run_state(RUN, RunState.OPEN)
    await road.pipeline.generate(ticket)
    assert len(await road.rows()) == 1


async def test_a_worker_that_stops_leaves_what_waits_unclaimed() -> None:
    gates = Gates()
    road = Road(engine=Engine(gates), slots=4)
    early, bad = await road.submit(group(0, [0]), group(1, [0]), limits=Limits(max_attempts=3))
    bad = await lost_to(road, bad, 3)
    tasks = [asyncio.create_task(road.pipeline.generate(ticket)) for ticket in (early, bad)]
    await async_wait_until(lambda: gates.gates)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [(t.example_index, t.attempt) for t in road.publisher.take()] == [(0, 2)]
    assert (await road.ledger.waiting(Stage.GENERATE, 0, 10))[0] == 2
    claim = await road.ledger.claim(bad, "other", 60.0)  # it is as good as before
    assert claim is not None
    assert claim.samples[0].fence.losses == 3
