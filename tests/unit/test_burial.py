"""The work of workers known to be dead goes back to the queue at once; that of others is left alone."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING

from gym_queue.cli.burial import bury_as_they_die, hand_back_of_the_dead, leased
from gym_queue.embedded.stack import Death
from gym_queue.errors import LedgerError
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.records import Example, Group, Limits, RunSpec, Stage, Ticket
from gym_queue.telemetry.machine import machine
from gym_queue.testing import async_wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from gym_queue.ledger.base import Lease, OwnedAttempt

DEAD, ALIVE = 4242, 4343
HERE = machine()


class FakePublisher:
    def __init__(self) -> None:
        self.tickets: list[Ticket] = []

    async def publish(self, tickets: Sequence[Ticket]) -> None:
        self.tickets.extend(tickets)

    async def depth(self, _: Stage) -> int:
        return 0


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


async def buried(ledger: MemoryLedger, worker: str) -> bool:
    return worker not in {lease.worker for lease in await ledger.leases()}


async def test_a_worker_is_buried_as_it_dies() -> None:
    ledger, publisher = MemoryLedger(), FakePublisher()
    await at_work(ledger, {"dead": (HERE, DEAD), "twin": ("elsewhere", DEAD), "other": (HERE, ALIVE)})
    deaths: asyncio.Queue[Death] = asyncio.Queue()
    ready: list[int] = []
    gravedigger = asyncio.create_task(bury_as_they_die(deaths, ledger, publisher, ready.append))
    [unclaimed] = await ledger.accept("r", 3, 4, [group(3)])
    deaths.put_nowait(Death(999, "was never a worker"))
    deaths.put_nowait(Death(DEAD, "was killed by SIGSEGV; its last words: ouch"))
    await async_wait_until(lambda: buried(ledger, "dead"), what="the burial")
    await async_wait_until(lambda: unclaimed in publisher.tickets, what="what it may have had in its memory")
    assert ready == [DEAD]
    assert await owners(ledger) == {"twin", "other"}
    [ticket] = {*publisher.tickets} - {unclaimed}
    assert (ticket.attempt, ticket.losses) == (2, 1)
    claim = await ledger.claim(ticket, "other", 600.0)
    assert claim is not None
    assert claim.samples[0].failures == 0, "its worker died: nobody knows whose fault it was"
    gravedigger.cancel()


async def test_a_worker_that_died_before_its_first_heartbeat_is_known_by_its_name() -> None:
    ledger, publisher = MemoryLedger(), FakePublisher()
    await at_work(ledger, {"other": ("elsewhere", DEAD)})
    young = f"gpu-node-{DEAD}-a1b2c3"
    [ticket] = await ledger.accept("r", 1, 2, [group(1)])
    assert await ledger.claim(ticket, young, 600.0)
    deaths: asyncio.Queue[Death] = asyncio.Queue()
    gravedigger = asyncio.create_task(bury_as_they_die(deaths, ledger, publisher))
    deaths.put_nowait(Death(DEAD, "was killed by SIGKILL"))
    await async_wait_until(lambda: buried(ledger, young), what="the burial")
    assert await owners(ledger) == {"other"}
    gravedigger.cancel()


async def test_a_rollout_that_was_alone_each_time_fails_with_the_last_words() -> None:
    ledger, publisher = MemoryLedger(), FakePublisher()
    await at_work(ledger, {"dead": (HERE, DEAD)})
    deaths: asyncio.Queue[Death] = asyncio.Queue()
    gravedigger = asyncio.create_task(bury_as_they_die(deaths, ledger, publisher))
    for number in range(Limits().max_attempts):
        deaths.put_nowait(Death(DEAD, "was killed by SIGSEGV; its last words (gpu1.log): ouch"))
        await async_wait_until(lambda: buried(ledger, "dead"), what="the burial")
        if number < Limits().max_attempts - 1:
            await ledger.heartbeat("dead", {"machine": HERE, "pid": str(DEAD)})
            [ticket] = {ticket for ticket in publisher.tickets if ticket.attempt == number + 2}
            assert await ledger.claim(ticket, "dead", 600.0)
    [event] = await ledger.events("r", "", 10, 0.0)
    row = json.loads(event.row)
    assert (row["state"], row["class"]) == ("failed", "infrastructure")
    assert "worker dead was killed by SIGSEGV; its last words (gpu1.log): ouch" in row["error"]
    gravedigger.cancel()


async def test_a_ledger_that_died_with_the_worker_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_queue.coordinator.patience._FIRST_PAUSE", 0.0)
    ledger, publisher = MemoryLedger(), FakePublisher()
    await at_work(ledger, {"dead": (HERE, DEAD)})
    leases, owned, troubles = ledger.leases, ledger.owned, [LedgerError("Redis is away") for _ in range(4)]

    async def sometimes() -> list[Lease]:
        if len(troubles) > 2:
            raise troubles.pop()
        return await leases()

    async def sometimes_owned(*arguments: object) -> list[OwnedAttempt]:
        if troubles:
            raise troubles.pop()
        return await owned(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ledger, "leases", sometimes)
    monkeypatch.setattr(ledger, "owned", sometimes_owned)
    deaths: asyncio.Queue[Death] = asyncio.Queue()
    gravedigger = asyncio.create_task(bury_as_they_die(deaths, ledger, publisher))
    deaths.put_nowait(Death(DEAD, "died"))
    await async_wait_until(lambda: not troubles and buried(ledger, "dead"), what="the burial")
    assert {ticket.attempt for ticket in publisher.tickets} == {2}
    gravedigger.cancel()
