"""A worker hands back what the ledger thinks it works on, and it does not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from gym_queue.ledger.base import Retry
from gym_queue.maintenance.disown import disown
from gym_queue.pipeline import attempt_of, attempts_of
from gym_queue.testing import async_wait_until
from tests.unit.road import RUN, Engine, Gate, Road, group

if TYPE_CHECKING:
    import pytest

    from gym_queue.ledger.base import Ledger
    from gym_queue.records import Ticket


async def handed_out(ledger: Ledger, tickets: list[Ticket]) -> None:
    for ticket in tickets:
        assert await ledger.claim(ticket, "gpu", 60.0)


async def test_what_nobody_works_on_is_handed_back_at_the_second_look(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    road = Road(ledger=ledger)
    tickets = await road.submit(group(0, [0]), group(1, [0]), group(2, [0]))
    await handed_out(ledger, tickets[:2])
    running = set(attempts_of(tickets[1]))
    unknown = await disown(ledger, road.publisher, "gpu", running)
    assert unknown == frozenset(attempts_of(tickets[0]))
    assert road.publisher.tickets == []
    await handed_out(ledger, tickets[2:])  # its answer is on the way
    assert await disown(ledger, road.publisher, "gpu", running, unknown) == frozenset(attempts_of(tickets[2]))
    assert [(t.example_index, t.attempt) for t in road.publisher.tickets] == [(0, 2)]
    assert caplog.text.count("handed back 1 rollouts") == 1
    found = await ledger.whereabouts(RUN, 0, 0)
    assert found is not None
    assert (found.failures, found.reason) == (0, "worker gpu had lost track of it")


async def test_what_was_unknown_and_is_worked_on_now_stays(ledger: Ledger) -> None:
    road = Road(ledger=ledger)
    tickets = await road.submit(group(0))
    await handed_out(ledger, tickets)
    unknown = await disown(ledger, road.publisher, "gpu", set())
    running = set(attempts_of(tickets[0]))
    assert len(unknown) == 2
    assert await disown(ledger, road.publisher, "gpu", running, unknown) == frozenset()
    assert road.publisher.tickets == []
    assert await disown(ledger, road.publisher, "gpu", set(), ()) == unknown  # seen once, again


async def test_what_a_pipeline_works_on_is_never_handed_back() -> None:
    gate = Gate()
    road = Road(engine=Engine(gate))
    (ticket,) = await road.submit(group(0))
    task = asyncio.create_task(road.pipeline.generate(ticket))
    await async_wait_until(lambda: gate.waiting == 2)
    unknown = await disown(road.ledger, road.publisher, "gpu", road.pipeline.running())
    assert await disown(road.ledger, road.publisher, "gpu", road.pipeline.running(), unknown) == frozenset()
    gate.open()
    await task
    assert len(await road.rows()) == 2


async def test_a_claim_that_has_ended_meanwhile_is_forgotten(ledger: Ledger) -> None:
    road = Road(ledger=ledger)
    (ticket,) = await road.submit(group(0, [0]))
    claim = await ledger.claim(ticket, "gpu", 60.0)
    assert claim is not None
    fence = claim.samples[0].fence
    unknown = await disown(ledger, road.publisher, "gpu", set())
    assert unknown == {attempt_of(fence)}
    await ledger.commit(fence, Retry())
    assert await disown(ledger, road.publisher, "gpu", set(), unknown) == frozenset()
    assert road.publisher.tickets == []
