"""The work of workers known to be dead goes back to the queue at once; that of others is left alone."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from gym_queue.cli.burial import bury_as_they_die, hand_back_of_the_dead, leased
from gym_queue.errors import LedgerError
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.records import Example, Group, Limits, RunSpec, Stage, Ticket
from gym_queue.telemetry.machine import machine
from gym_queue.testing import async_wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from gym_queue.ledger.base import Lease

DEAD, ALIVE = 4242, 4343
HERE = machine()


class FakePublisher:
    def __init__(self) -> None:
        self.tickets: list[Ticket] = []

    async def publish(self, tickets: Sequence[Ticket]) -> None:
        self.tickets.extend(tickets)


def group(index: int) -> Group:
    example = Example(id=str(index), environment="rows", row={})
    return Group(example_index=index, samples=(0,), example=example)


async def at_work(ledger: MemoryLedger, pids: dict[str, tuple[str, int]]) -> None:
    """Let each worker (name, node, process id) own one rollout."""
    spec = RunSpec(run_id="r", model="stub:", samples=1, limits=Limits(retry_base_delay=0.0))
    await ledger.open_run(spec, "r")
    tickets = await ledger.accept("r", 0, len(pids), [group(index) for index in range(len(pids))])
    for ticket, (name, (node, pid)) in zip(tickets, pids.items(), strict=True):
        await ledger.heartbeat(name, {"machine": node, "pid": str(pid)})
        assert await ledger.claim(ticket, name, 600.0)


async def owners(ledger: MemoryLedger) -> set[str]:
    return {lease.worker for lease in await ledger.leases() if await ledger.owned(lease.worker, None, 10)}


async def test_leases_of_this_machine_only() -> None:
    ledger = MemoryLedger()
    await at_work(ledger, {"a": (HERE, ALIVE), "b": ("elsewhere", DEAD)})
    assert await leased(ledger) == {ALIVE}


async def test_in_a_shared_ledger_only_this_machines_dead_are_gone() -> None:
    ledger, publisher = MemoryLedger(), FakePublisher()
    child = await asyncio.create_subprocess_exec("true")
    await child.wait()  # its id names no process any more
    workers = {"dead": (HERE, child.pid), "alive": (HERE, os.getpid()), "far": ("elsewhere", child.pid)}
    await at_work(ledger, workers)
    await hand_back_of_the_dead(ledger, publisher)
    assert await owners(ledger) == {"alive", "far"}
    assert [ticket.attempt for ticket in publisher.tickets] == [2]


async def test_what_an_earlier_command_left_is_given_back() -> None:
    ledger, publisher = MemoryLedger(), FakePublisher()
    await at_work(ledger, {"old": (HERE, DEAD), "new": (HERE, ALIVE)})
    await hand_back_of_the_dead(ledger, publisher, {ALIVE})
    assert await owners(ledger) == {"new"}
    assert [lease.worker for lease in await ledger.leases()] == ["new"]
    [ticket] = publisher.tickets
    assert (ticket.stage, ticket.example_index) == (Stage.GENERATE, 0)
    claim = await ledger.claim(ticket, "new", 600.0)
    assert claim is not None
    assert claim.samples[0].failures == 0, "nobody failed"


async def again(ledger: MemoryLedger, publisher: FakePublisher, after: Ticket) -> set[Ticket]:
    """Return the tickets of what was given back: published, or due at once."""
    return {*publisher.tickets, *await ledger.promote_due(10)} - {after}


async def test_a_worker_is_buried_as_it_dies() -> None:
    ledger, publisher = MemoryLedger(), FakePublisher()
    await at_work(ledger, {"dead": (HERE, DEAD), "twin": ("elsewhere", DEAD), "other": (HERE, ALIVE)})
    deaths: asyncio.Queue[int] = asyncio.Queue()
    gravedigger = asyncio.create_task(bury_as_they_die(deaths, ledger, publisher))

    async def buried() -> bool:
        return await owners(ledger) == {"twin", "other"}

    [unclaimed] = await ledger.accept("r", 3, 4, [group(3)])
    deaths.put_nowait(DEAD)
    await async_wait_until(buried, what="the burial")
    await async_wait_until(lambda: unclaimed in publisher.tickets, what="what it may have had in its memory")
    [ticket] = await again(ledger, publisher, after=unclaimed)
    claim = await ledger.claim(ticket, "other", 600.0)
    assert claim is not None
    assert claim.samples[0].failures == 1
    gravedigger.cancel()


async def test_a_ledger_that_does_not_answer_stops_no_burials(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, publisher = MemoryLedger(), FakePublisher()
    await at_work(ledger, {"dead": (HERE, DEAD)})
    answer, answers = ledger.leases, [LedgerError("Redis is away")]

    async def sometimes() -> list[Lease]:
        if answers:
            raise answers.pop()
        return await answer()

    monkeypatch.setattr(ledger, "leases", sometimes)
    deaths: asyncio.Queue[int] = asyncio.Queue()
    gravedigger = asyncio.create_task(bury_as_they_die(deaths, ledger, publisher))
    deaths.put_nowait(DEAD)
    await async_wait_until(lambda: "waits until its lease runs out: Redis is away" in caplog.text)
    deaths.put_nowait(DEAD)

    async def buried() -> bool:
        return not await answer()

    await async_wait_until(buried, what="the burial")
    assert {ticket.attempt for ticket in publisher.tickets} == {2}  # handed back at the second try
    gravedigger.cancel()
