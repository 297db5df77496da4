"""A Redis that is away, stalls, restarts or fails over: nothing is lost, doubled, or said twice."""

from __future__ import annotations

import asyncio
import inspect
import re
import signal
import socket
from typing import TYPE_CHECKING

import pytest
import redis

from gym_queue import names
from gym_queue.embedded.preflight import check_redis
from gym_queue.errors import LedgerError
from gym_queue.ledger.base import Generated, Retry
from gym_queue.ledger.connection import Patience
from gym_queue.records import Stage, Weights
from gym_queue.testing import async_wait_until
from tests.contract.redis_trouble import Network, Sentinels, ledger_at, said
from tests.contract.test_ledger import RUN, claimed, ended, submit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from gym_queue.embedded.redis import RedisServer
    from gym_queue.ledger.base import Outcome
    from gym_queue.ledger.redis import RedisLedger
    from gym_queue.records import Ticket

GROUPS, EARLY = 150, 40
HASTY = Patience(connect=0.5, answer=0.5, repeat=60.0)


async def work_off(ledger: RedisLedger, ticket: Ticket) -> None:
    """Bring both samples of a ticket to their end: one by way of a verifier, one after a retry."""
    one, other = await claimed(ledger, ticket)
    verify, again = await asyncio.gather(
        ledger.commit(one, Generated(payload=b"trajectory")), ledger.commit(other, Retry())
    )
    for receipt in (verify, again):
        assert receipt.accepted
        (fence,) = await claimed(ledger, receipt.ticket)
        assert (await ledger.commit(fence, ended(fence))).accepted


async def check_that_all_ended_once(ledger: RedisLedger, groups: int) -> None:
    status = await ledger.run(RUN)
    assert status is not None
    assert (status.accepted, status.succeeded, status.failed, status.cancelled) == (2 * groups,) * 2 + (0, 0)
    assert (status.queued, status.in_flight, status.retried, status.refused) == (0, 0, groups, 0)
    rows = [event.row for event in await ledger.events(RUN, "", 10_000, 0)]
    assert sorted(rows) == sorted(
        f"{index}.{sample}".encode() for index in range(groups) for sample in (0, 1)
    )
    assert await ledger.owned("a", None, 10) == []
    for stage in Stage:
        assert (await ledger.waiting(stage, 0, 10))[0] == 0


async def under_load(ledger: RedisLedger, trouble: Callable[[], object], groups: int = GROUPS) -> None:
    """Work a run off, many rollouts at a time; ``trouble`` strikes when an early example has ended."""
    slots = asyncio.Semaphore(50)

    async def serve(ticket: Ticket) -> None:
        async with slots:
            await work_off(ledger, ticket)
            if ticket.example_index == EARLY:
                answer = trouble()
                if inspect.isawaitable(answer):
                    await answer

    await asyncio.gather(*map(serve, await submit(ledger, groups=groups)))
    await check_that_all_ended_once(ledger, groups)


# --- connections that break -----------------------------------------------------------------------------


async def test_every_connection_is_killed_again_and_again(server: RedisServer) -> None:
    killed = 0
    with redis.Redis.from_url(server.url) as client:

        def scripts_run() -> int:
            return int(client.info("commandstats")["cmdstat_evalsha"]["calls"])

        async def kill() -> None:
            nonlocal killed
            while killed < 15:
                before = scripts_run()
                killed += int(client.execute_command("CLIENT", "KILL", "TYPE", "normal"))
                await async_wait_until(lambda: scripts_run() > before)  # noqa: B023 - used at once

        async with ledger_at(server.url) as ledger:
            await under_load(ledger, kill, groups=1000)


@pytest.mark.guarantee("G3")
async def test_redis_is_killed_and_restarts_from_its_file(server: RedisServer) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.config_set("appendfsync", "always")  # with less, what Redis took may be lost when it dies

    async def restart() -> None:
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        server.spawn()
        await asyncio.to_thread(server.wait_ready)

    async with ledger_at(server.url) as ledger:
        await under_load(ledger, restart)


async def test_redis_is_stopped_for_longer_than_an_answer_may_take(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gym_queue.ledger.views.PATIENT", HASTY)

    async def stop() -> None:
        assert server.process is not None
        server.process.send_signal(signal.SIGSTOP)
        try:
            await async_wait_until(lambda: any("does not answer" in line for line in said(caplog)))
        finally:
            server.process.send_signal(signal.SIGCONT)

    async with ledger_at(server.url) as ledger:
        await under_load(ledger, stop)


async def test_a_network_that_holds_all_back_and_delivers_it_late(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls that were given up and made again arrive twice, in any order."""
    monkeypatch.setattr("gym_queue.ledger.views.PATIENT", HASTY)
    async with Network(str(server.socket_path)) as network, ledger_at(network.url) as ledger:

        async def stall() -> None:
            network.stall()
            await async_wait_until(lambda: any("does not answer" in line for line in said(caplog)))
            assert network.stalled > 0
            network.heal()

        await under_load(ledger, stall)
    assert [line.partition(" (")[0] for line in said(caplog)] == [
        "Redis does not answer",
        "Redis answers again",
    ]


async def test_connections_that_went_deaf_are_left_for_new_ones(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall forgot them. However short the patience: those that stand are no reason to give up."""
    monkeypatch.setattr("gym_queue.ledger.views.PATIENT", Patience(connect=0.5, answer=0.3, repeat=0.2))
    async with Network(str(server.socket_path)) as network, ledger_at(network.url) as ledger:
        assert not any(await asyncio.gather(*(ledger.run(RUN) for _ in range(10))))
        network.deafen()
        await ledger.heartbeat("a", {})
        assert all(await asyncio.gather(*(ledger.leases() for _ in range(10))))
        assert network.stalled == 1  # the first to find out let go of all


async def test_the_kernel_is_asked_to_notice_a_network_that_is_cut(server: RedisServer) -> None:
    """An idle connection learns of it in half a minute; what was sent and given up does not arrive later."""
    async with Network(str(server.socket_path)) as network, ledger_at(network.url) as ledger:
        await ledger.heartbeat("a", {})
        (connection,) = ledger._client.connection_pool._available_connections
        link = connection._writer.get_extra_info("socket")
        assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle, every, times = (
            link.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
            for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
        )
        assert idle + every * times <= 30
        assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000


# --- answers that are lost ------------------------------------------------------------------------------


@pytest.fixture
async def network(server: RedisServer) -> AsyncIterator[Network]:
    async with Network(str(server.socket_path)) as open_network:
        yield open_network


@pytest.mark.parametrize("revoke", [False, True])
@pytest.mark.parametrize("kind", ["generated", "retry", "ended", "last of its group"])
async def test_a_commit_whose_answer_is_lost_counts_once(
    network: Network, kind: str, *, revoke: bool
) -> None:
    async with ledger_at(network.url) as ledger:
        (ticket,) = await submit(ledger)
        fence, other = await claimed(ledger, ticket)
        if kind == "last of its group":
            await ledger.commit(other, ended(other))
        followed: dict[str, Outcome] = {"generated": Generated(payload=b"t"), "retry": Retry()}
        outcome = followed.get(kind, ended(fence))
        network.answers_to_lose = 1
        receipt = await ledger.commit(fence, outcome, revoke=revoke)
        assert network.answers_to_lose == 0
        assert receipt.accepted
        if kind in followed:
            await claimed(ledger, receipt.ticket)
        status = await ledger.run(RUN)
        assert status is not None
        assert (status.refused, status.retried) == (0, int(kind == "retry"))
        assert await ledger.revoked("a", 10) == [fence] * revoke
        # The same again, but as a call of its own, is what it always was: late.
        assert not (await ledger.commit(fence, outcome)).accepted
        status = await ledger.run(RUN)
        assert status is not None
        assert status.refused == 1


async def test_a_refusal_whose_answer_is_lost_is_a_refusal(network: Network) -> None:
    async with ledger_at(network.url) as ledger:
        (ticket,) = await submit(ledger)
        fence, _ = await claimed(ledger, ticket)
        await ledger.commit(fence, Retry(), revoke=True)  # the sweep, in its stead
        network.answers_to_lose = 1
        assert not (await ledger.commit(fence, ended(fence))).accepted
        assert network.answers_to_lose == 0


async def test_an_announcement_whose_answer_is_lost_is_no_refusal(network: Network) -> None:
    async with ledger_at(network.url) as ledger:
        network.answers_to_lose = 1
        assert await ledger.announce(Weights(model="stub:", version=1))
        assert network.answers_to_lose == 0
        assert not await ledger.announce(Weights(model="stub:", version=1))


async def test_commits_are_remembered_for_a_while_only(server: RedisServer) -> None:
    async with ledger_at(server.url) as ledger:
        (ticket,) = await submit(ledger)
        fence, _ = await claimed(ledger, ticket)
        key = "gq:written:a"
        longest = 0
        for _ in range(1600):
            receipt = await ledger.commit(fence, Retry(counted=False))
            (fence,) = await claimed(ledger, receipt.ticket)
            longest = max(longest, await ledger._client.llen(key))
        assert 1000 < longest <= 1501
        assert 0 < await ledger._client.ttl(key) <= 3600


# --- what is said ---------------------------------------------------------------------------------------


async def test_an_outage_is_one_line_and_its_end_another(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever notices: callers that wait and callers that do not, of several ledgers."""
    async with ledger_at(server.url) as ledger, ledger_at(server.url, patient=False) as hasty:
        tickets = await submit(ledger, groups=20)
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        claims = asyncio.gather(*(ledger.claim(ticket, "a", 60) for ticket in tickets))
        looks = asyncio.gather(*(ledger.whereabouts(RUN, 0, 0) for _ in range(20)))
        for _ in range(3):
            with pytest.raises(LedgerError, match=r"^Redis does not answer \("):
                await hasty.heartbeat("a", {})
        server.spawn()
        await asyncio.to_thread(server.wait_ready)
        assert all(await claims)
        assert all(await looks)
        await hasty.heartbeat("a", {})
    first, last = said(caplog)
    assert re.fullmatch(r"Redis does not answer \(.*\); waiting", first)
    assert last == "Redis answers again"


async def test_one_connection_that_breaks_is_not_worth_a_line(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with Network(str(server.socket_path)) as network, ledger_at(network.url) as ledger:
        await submit(ledger)
        network.answers_to_lose = 1
        assert await ledger.run(RUN)
        assert network.answers_to_lose == 0
    assert said(caplog) == []


async def test_an_error_that_waiting_does_not_heal_is_no_outage(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with ledger_at(server.url) as ledger:
        for key in (names.leases_key(), names.runs_key()):
            await ledger._client.set(key, "not what belongs there")
        for _ in range(2):
            with pytest.raises(LedgerError, match="WRONGTYPE"):
                await ledger.heartbeat("a", {})
            with pytest.raises(LedgerError, match="WRONGTYPE"):
                await ledger.runs()
        assert await ledger.run(RUN) is None
    assert sum("WRONGTYPE" in line for line in said(caplog)) == len(said(caplog)) == 2


async def test_a_door_that_is_locked_is_no_outage(server: RedisServer) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.config_set("requirepass", "secret")
        async with ledger_at(server.url) as ledger:
            with pytest.raises(LedgerError, match=r"(?i)^Redis: .*authenticat"):
                await ledger.run(RUN)


async def test_waiting_for_events_is_not_taken_for_an_outage(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gym_queue.ledger.views.PATIENT", HASTY)
    async with ledger_at(server.url) as ledger:
        await submit(ledger)
        assert await ledger.events(RUN, "", 10, wait=2 * HASTY.answer) == []
    assert said(caplog) == []


async def test_who_must_not_be_held_up_is_not(server: RedisServer) -> None:
    """A stopped Redis takes connections and never answers; the worker's main thread waits two seconds."""
    async with ledger_at(server.url, patient=False) as ledger:
        await ledger.heartbeat("a", {})
        assert server.process is not None
        server.process.send_signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(8):
                with pytest.raises(LedgerError, match="does not answer"):
                    await ledger.heartbeat("a", {})
        finally:
            server.process.send_signal(signal.SIGCONT)


# --- another Redis takes over ---------------------------------------------------------------------------


@pytest.fixture
def sentinels(tmp_path: Path, unused_tcp_port_factory: Callable[[], int]) -> Iterator[Sentinels]:
    with Sentinels(tmp_path, [unused_tcp_port_factory() for _ in range(3)]) as running:
        yield running


async def test_a_failover_is_followed(sentinels: Sentinels, caplog: pytest.LogCaptureFixture) -> None:
    async with ledger_at(sentinels.url) as ledger:
        await under_load(ledger, sentinels.kill_the_master)
        assert await ledger._client.info("replication") != {}
        with sentinels.client(sentinels.replica) as client:
            assert client.info("replication")["role"] == "master"
            assert client.exists("gq:run:" + RUN)
    assert [line.partition(" (")[0] for line in said(caplog)] == [
        "Redis does not answer",
        "Redis answers again",
    ]


async def test_a_master_that_comes_back_as_a_replica_is_left(sentinels: Sentinels) -> None:
    async with ledger_at(sentinels.url) as ledger:
        (ticket,) = await submit(ledger)
        await async_wait_until(sentinels.swap, timeout=30)
        with sentinels.client(sentinels.master) as old:
            await async_wait_until(lambda: old.info("replication")["role"] == "slave", timeout=30)
        await work_off(ledger, ticket)
        await check_that_all_ended_once(ledger, 1)


def test_sentinels_are_asked_before_anything_starts(sentinels: Sentinels) -> None:
    check_redis(sentinels.url)
