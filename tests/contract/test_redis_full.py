"""A Redis that answers and takes no writes: demoted, without disk, without memory. It is waited for."""

from __future__ import annotations

import asyncio
import re
import resource
from functools import partial
from typing import TYPE_CHECKING

import pytest
import redis

from gym_queue.coordinator.patience import patiently
from gym_queue.embedded.redis import RedisServer
from gym_queue.errors import REDIS_DISK_FULL, REDIS_FULL, LedgerError
from gym_queue.ledger.base import Generated, Retry
from gym_queue.records import RunState
from gym_queue.testing import async_wait_until
from tests.contract.redis_trouble import Network, ledger_at, said
from tests.contract.test_ledger import RUN, claimed, ended, group, spec, submit

if TYPE_CHECKING:
    from pathlib import Path

    from gym_queue.ledger.redis import RedisLedger
    from gym_queue.records import Fence, Ticket


async def test_a_master_that_was_demoted_is_waited_for(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with ledger_at(server.url) as ledger:
        (ticket,) = await submit(ledger)
        with redis.Redis.from_url(server.url) as client:
            client.replicaof("127.0.0.1", "1")
            claim = asyncio.create_task(ledger.claim(ticket, "a", 60))
            taken = asyncio.create_task(ledger.revoked("a", 10))  # no script: its error is spelled otherwise
            await async_wait_until(lambda: said(caplog))
            assert not claim.done()
            assert not taken.done()
            client.replicaof("NO", "ONE")
        assert await claim
        assert await taken == []
    first, last = said(caplog)
    assert "read only replica" in first
    assert last == "Redis answers again"


async def test_a_master_whose_address_leads_to_another_one_is_left(
    server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Connections that stand still lead to the old one."""
    with RedisServer(tmp_path / "other") as other:
        async with (
            Network(str(server.socket_path)) as network,
            ledger_at(network.url) as ledger,
            ledger_at(other.url) as replicated,
        ):
            (ticket,) = await submit(ledger)
            await submit(replicated)
            with redis.Redis.from_url(server.url) as client:
                client.replicaof("127.0.0.1", "1")
            claim = asyncio.create_task(ledger.claim(ticket, "a", 60))
            await async_wait_until(lambda: said(caplog))
            network.lead_to(str(other.socket_path))
            assert await claim


async def test_a_disk_that_is_full_is_waited_for(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with ledger_at(server.url) as ledger:
        tickets = await submit(ledger, groups=2)
        assert server.process is not None
        file = server.folder / "appendonly.aof"
        if not file.exists():  # Redis 7 writes several
            (file,) = server.folder.glob("appendonlydir/*.incr.aof")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (file.stat().st_size, -1))
        with redis.Redis.from_url(server.url) as client:
            await ledger.heartbeat("a", {})
            await async_wait_until(lambda: client.info("persistence")["aof_last_write_status"] != "ok")
        for ticket in tickets:
            with pytest.raises(LedgerError, match=re.escape(REDIS_DISK_FULL)):
                await ledger.claim(ticket, "a", 60)
        assert await ledger.run(RUN)  # reading goes on
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (-1, -1))
        for ticket in tickets:
            assert await patiently(partial(ledger.claim, ticket, "a", 60))
    assert said(caplog) == [f"{REDIS_DISK_FULL}; waiting", "Redis takes calls again"]


async def test_a_full_redis_takes_nothing_new_and_lets_the_rest_end(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    big = b"x" * 20_000
    async with ledger_at(server.url) as ledger:
        tickets = await submit(ledger, groups=50)
        fences = [fence for ticket in tickets[:20] for fence in await claimed(ledger, ticket)]
        with redis.Redis.from_url(server.url) as client:
            client.config_set("maxmemory", client.info("memory")["used_memory"] // 2)
            with pytest.raises(redis.exceptions.OutOfMemoryError):
                client.set("more", 1)
            for _ in range(2):
                with pytest.raises(LedgerError, match=re.escape(REDIS_FULL)):
                    await ledger.accept(RUN, 50, 51, [group(50)])
            more = asyncio.create_task(patiently(partial(ledger.accept, RUN, 50, 51, [group(50)])))
            with pytest.raises(LedgerError, match=re.escape(REDIS_FULL)):
                await ledger.open_run(spec(run_id="run-2"), "key-2")

            drained = await drain(ledger, tickets, fences, big)
            assert not more.done()
            with pytest.raises(redis.exceptions.OutOfMemoryError):  # all of that was done by a full Redis
                client.set("more", 1)
            await ledger.acknowledge(RUN, drained)
            client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 1.2))
            assert len(await more) == 1
    assert said(caplog) == [f"{REDIS_FULL}; waiting", "Redis takes calls again"]


async def drain(ledger: RedisLedger, tickets: list[Ticket], fences: list[Fence], big: bytes) -> str:
    """Do everything that brings rollouts to their end. Returns the position of the last event."""
    await ledger.heartbeat("a", {"slots": "1"})
    await ledger.heartbeat("new", {"slots": "1"})
    one, two, three, four, *rest = fences
    verify = await ledger.commit(one, Generated(payload=big))
    (one,) = await claimed(ledger, verify.ticket, worker="new")
    assert (await ledger.commit(one, ended(one))).accepted
    again = await ledger.commit(two, Retry(lost=True, reason="its worker died"), revoke=True)
    (two,) = await claimed(ledger, again.ticket)
    assert await ledger.end(RUN, ended(two, "cancelled"))
    assert len(await ledger.revoked("a", 10)) == 2
    await ledger.commit(three, Retry(delay=0.000001))
    due: list[Ticket] = []
    while not due:
        due = await ledger.promote_due(10)
    (three,) = await claimed(ledger, due[0])
    assert await ledger.end(RUN, ended(three, "failed"))
    assert not (await ledger.commit(three, ended(three))).accepted
    await ledger.count_republished(RUN, 1)
    waiting = ended(three.model_copy(update={"example_index": tickets[30].example_index}), "failed")
    assert await ledger.end(RUN, waiting, waiting_attempt=1)
    assert await ledger.set_run_state(RUN, RunState.PAUSED)
    assert await ledger.claim(tickets[21], "a", 60) is None
    assert await ledger.set_run_state(RUN, RunState.OPEN)
    for fence in [four, *rest, *await claimed(ledger, tickets[20])]:
        assert (await ledger.commit(fence, ended(fence))).accepted
    await ledger.drop_lease("new")
    for _ in range(2):  # who acknowledges must be able to lead
        assert await ledger.lead("coordinator", "a", 60.0)
    await ledger.resign("coordinator", "a")
    return (await ledger.events(RUN, "", 1000, 0))[-1].position


async def test_new_work_is_refused_before_there_is_no_room_for_its_tickets(server: RedisServer) -> None:
    async with ledger_at(server.url) as ledger:
        await submit(ledger)
        with redis.Redis.from_url(server.url) as client:
            client.config_set("maxmemory", int(client.info("memory")["used_memory"] / 0.95))
            with pytest.raises(LedgerError, match=re.escape(REDIS_FULL)):
                await ledger.accept(RUN, 1, 2, [group(1)])
            assert len(await ledger.accept(RUN, 0, 1, [group(0)])) == 1  # that was accepted before
            client.lpush("a queue of the broker", "ticket")
            client.config_set("maxmemory", int(client.info("memory")["used_memory"] / 0.8))
            assert len(await ledger.accept(RUN, 1, 2, [group(1)])) == 1
