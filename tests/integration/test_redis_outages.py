"""Redis that goes away, loses its clients, is full or is demoted under real workers and beat: they wait, say
so once, and nothing is lost.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import redis

from gym_queue.embedded.redis import RedisServer
from tests.integration.fleet import IMPATIENT, Fleet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

pytestmark = pytest.mark.timeout(90)

OUTAGE = 3.0
"""Seconds. Longer than ``WORKER_TIMEOUT`` here: no worker can renew its lease, and none is to blame."""


@contextmanager
def stopped(server: RedisServer, _client: redis.Redis) -> Iterator[None]:
    assert server.process is not None
    server.process.terminate()
    server.process.wait()
    yield
    server.start()


@contextmanager
def without_its_clients(_server: RedisServer, client: redis.Redis) -> Iterator[None]:
    for kind in ("normal", "pubsub"):
        client.client_kill_filter(_type=kind, skipme=True)
    yield


@contextmanager
def demoted(_server: RedisServer, client: redis.Redis) -> Iterator[None]:
    client.replicaof("127.0.0.1", "1")
    yield
    client.replicaof("NO", "ONE")


@contextmanager
def full(_server: RedisServer, client: redis.Redis) -> Iterator[None]:
    client.config_set("maxmemory", 1)
    yield
    client.config_set("maxmemory", 0)


@contextmanager
def unable_to_write_its_file(server: RedisServer, client: redis.Redis) -> Iterator[None]:
    """A failed snapshot has the same effect as a full disk: every write, and PING, is refused (MISCONF)."""
    in_the_way = server.folder / "dump.rdb"
    in_the_way.mkdir()
    client.config_set("save", "1 1")
    client.bgsave()
    while client.info("persistence")["rdb_last_bgsave_status"] != "err":
        client.time()
    yield
    client.config_set("stop-writes-on-bgsave-error", "no")
    client.config_set("save", "")  # or it could not end


TROUBLES = [stopped, without_its_clients, demoted, full, unable_to_write_its_file]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.__name__)
async def test_workers_and_beat_outlive_a_redis_that_is(
    tmp_path: Path, trouble: Callable[..., AbstractContextManager[None]]
) -> None:
    with RedisServer(tmp_path / "redis") as server, redis.Redis.from_url(server.url) as client:
        async with Fleet(server.url, tmp_path, **IMPATIENT) as fleet:
            await fleet.start("gpu", "cpu", "beat")
            run = await fleet.submit([{"wait": True, "queued": True}, {}] * 50, samples=2)
            await fleet.in_flight("gpu", 100)
            with trouble(server, client):
                await asyncio.sleep(OUTAGE)  # the one thing here that is about time
                fleet.gate.touch()
            await fleet.collect(run, timeout=30)
            status = await fleet.ledger.run("run")
            assert status is not None
            assert (status.succeeded, status.retried, status.lost) == (200, 0, 0)
            assert status.dropped < 50, "tickets that are worked on are not put back into the queue"
            for name, process in fleet.processes.items():
                assert process.poll() is None
                complaints = [line for line in fleet.log(name) if "INFO" not in line]
                assert len(complaints) <= 5, complaints
                assert all(" gym_queue." in line for line in complaints), complaints
    assert {(row.state, row.attempt) for row in run.rows()} == {("succeeded", 1)}
