"""What every ledger must do for who wants to know whether workers still answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gym_queue.ledger.base import SERVER
from tests.contract.ledgers import leftovers
from tests.contract.test_ledger import claimed, submit

if TYPE_CHECKING:
    from gym_queue.ledger.base import Ledger


GPU = {"kind": "gpu"}


async def round_trips(ledger: Ledger) -> dict[str, float | None]:
    return {lease.worker: lease.round_trip for lease in await ledger.leases()}


async def test_a_worker_that_answers_is_known_by_how_long_that_took(ledger: Ledger) -> None:
    for worker in ("a", "b"):
        await ledger.heartbeat(worker, GPU)
    assert await round_trips(ledger) == {"a": None, "b": None}
    assert not await ledger.answer_probe("a")  # nobody asked
    assert await ledger.probe() == 2
    assert await ledger.answer_probe("a")
    assert not await ledger.answer_probe("a")
    first = await round_trips(ledger)
    assert first["a"] is not None
    assert 0.0 <= first["a"] < 60.0
    assert (await round_trips(ledger))["a"] == first["a"]  # it is over: it grows no more
    assert await ledger.probe() == 1  # b has not answered the first


async def test_a_worker_that_does_not_answer_is_known_by_how_long_it_has_not(ledger: Ledger) -> None:
    await ledger.heartbeat("a", GPU)
    await ledger.probe()
    first = (await round_trips(ledger))["a"]
    assert first is not None
    while True:
        later = (await round_trips(ledger))["a"]
        assert later is not None
        if later > first:
            break
    await ledger.answer_probe("a")
    answered = (await round_trips(ledger))["a"]
    assert answered is not None
    assert answered >= later


async def test_nothing_is_left_of_a_worker_that_is_gone(ledger: Ledger) -> None:
    for worker in ("a", "b"):
        await ledger.heartbeat(worker, GPU)
    await ledger.probe()
    await ledger.answer_probe("a")
    await ledger.probe()
    for worker in ("a", "b"):
        await ledger.drop_lease(worker)
    assert not await ledger.answer_probe("b")
    assert await ledger.leases() == []
    assert await leftovers(ledger) == []
    await ledger.heartbeat("a", GPU)
    assert await round_trips(ledger) == {"a": None}


async def test_servers_and_who_has_not_said_what_it_is_are_not_asked(ledger: Ledger) -> None:
    await ledger.heartbeat("server-1", {"kind": SERVER})
    (ticket,) = await submit(ledger)
    await claimed(ledger, ticket, "new")
    assert await ledger.probe() == 0
    assert await round_trips(ledger) == {"server-1": None, "new": None}
