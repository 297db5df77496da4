"""A Redis that loses what it knew in the middle of a run: each rollout is in the output once all the same.

A real command, a real fleet. What makes it possible: the archive's own record of what is done (G1, G3).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from redis import Redis

from gym_queue.embedded.redis import RedisServer
from gym_queue.testing import async_wait_until
from tests.acceptance.commands import Command, check_each_once, metrics, submitted, write_input
from tests.integration.fleet import WORLD, Fleet

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EXAMPLES, SAMPLES = 60, 2
SOON = {"WORKER_HEARTBEAT_INTERVAL": 0.5, "GYM_QUEUE_SWEEP_INTERVAL": 0.5, "GYM_QUEUE_CONCURRENCY": 8}
ARGUMENTS = ["--model", "stub:?delay=0.05", "--environment", WORLD, "--samples", str(SAMPLES)]
NO_WORKERS = ["--workers", "0", "--verifiers", "0"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as server:
        yield server


async def finished(command: Command) -> None:
    assert await asyncio.to_thread(command.end) == 0, command.said
    check_each_once(command.folder, EXAMPLES, SAMPLES)
    assert metrics(command.folder)["complete"] is True


async def test_everything_is_flushed(tmp_path: Path, server: RedisServer) -> None:
    write_input(tmp_path, [{"queued": number % 2} for number in range(EXAMPLES)])
    async with Fleet(server.url, tmp_path, **SOON) as fleet:
        await fleet.start("gpu1", "cpu1", "beat")
        with submitted(
            tmp_path, *ARGUMENTS, *NO_WORKERS, GYM_QUEUE_REDIS_URL=server.url, GYM_QUEUE_WINDOW=16
        ) as command:
            await asyncio.to_thread(command.reach, 20)
            with Redis.from_url(server.url) as client:
                client.flushall()
            await finished(command)
            assert command.said.count("the ledger has lost run") == 1
        with Redis.from_url(server.url) as client:
            assert [key for key in client.keys("gq:*") if b"run" in key or b"group" in key] == []


async def test_a_crashed_redis_comes_back_with_an_older_file(tmp_path: Path, server: RedisServer) -> None:
    """As after a crash of the machine, or a failover to a replica that lagged behind.

    Half of the rollouts wait at a gate, so that they are under way when it happens.
    """
    write_input(tmp_path, [{"wait": number >= EXAMPLES // 2} for number in range(EXAMPLES)])
    async with Fleet(server.url, tmp_path, **SOON) as fleet:
        await fleet.start("gpu1", "cpu1", "beat")
        with submitted(
            tmp_path, *ARGUMENTS, *NO_WORKERS, GYM_QUEUE_REDIS_URL=server.url, GYM_QUEUE_WINDOW=16
        ) as command:
            await asyncio.to_thread(command.reach, 10)
            log = appended_file(tmp_path / "redis")
            older = log.read_bytes()
            await asyncio.to_thread(command.reach, EXAMPLES // 2 * SAMPLES)
            await async_wait_until(lambda: under_way(fleet), 30, what="rollouts at the gate")
            assert server.process is not None
            server.process.kill()
            server.process.wait()
            log.write_bytes(older)
            # Sooner back, it would have been no outage to the command.
            await asyncio.to_thread(command.says, "Redis does not answer")
            server.start()
            fleet.gate.touch()
            await finished(command)
            assert command.said.count("lost examples") == 1
            assert command.said.count("Redis does not answer") == 1
            assert command.said.count("Redis answers again") == 1


def appended_file(folder: Path) -> Path:
    """Return the file that Redis appends to: from Redis 7 on there is a folder of them."""
    files = folder.rglob("appendonly.aof*")
    [file] = [path for path in files if path.name == "appendonly.aof" or path.name.endswith(".incr.aof")]
    return file


async def under_way(fleet: Fleet) -> bool:
    return await fleet.owned("gpu1") == 8
