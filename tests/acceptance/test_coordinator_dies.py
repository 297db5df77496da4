"""``kill -9`` of the coordinator, many times: with ``--resume`` each rollout is there once (G3, G9).

A fleet of its own goes on meanwhile, as on a cluster.
"""

from __future__ import annotations

import asyncio
import random
import textwrap
from typing import TYPE_CHECKING

import pytest

from tests.acceptance.commands import check_each_once, metrics, submitted, write_input
from tests.integration.fleet import Fleet

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLES, SAMPLES = 150, 2
WINDOW = {"GYM_QUEUE_WINDOW": "24"}  # so much goes on without a coordinator
ARGUMENTS = [
    "--model", "stub:?delay=0.05", "--samples", str(SAMPLES), "--workers", "0", "--verifiers", "0",
]  # fmt: skip

# The command kills itself when it is about to acknowledge what it has just written, for the n-th time.
DEADLY = textwrap.dedent(
    """
    import itertools, os, pathlib, signal, sys

    wanted = pathlib.Path(__file__).with_name("dies_at")
    if wanted.exists() and any(word.endswith("cli.submit") for word in sys.orig_argv):
        from gym_queue.ledger.redis import RedisLedger

        acknowledge, calls, last = RedisLedger.acknowledge, itertools.count(1), int(wanted.read_text())

        async def deadly(self, *arguments):
            if next(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return await acknowledge(self, *arguments)

        RedisLedger.acknowledge = deadly
    """
)


async def resumed_to_the_end(folder: Path, redis_url: str) -> None:
    with submitted(folder, *ARGUMENTS, "--resume", GYM_QUEUE_REDIS_URL=redis_url, **WINDOW) as command:
        assert await asyncio.to_thread(command.end) == 0, command.said
    check_each_once(folder, EXAMPLES, SAMPLES)
    found = metrics(folder)
    assert found["complete"] is True
    assert found["rollouts"]["ended"] == found["rollouts"]["accepted"] == EXAMPLES * SAMPLES


@pytest.mark.parametrize("seed", [1, 2])
async def test_killed_at_random(tmp_path: Path, redis_url: str, seed: int) -> None:
    chance = random.Random(seed)
    write_input(tmp_path, [{"prompt": f"{number}?", "answer": "ok"} for number in range(EXAMPLES)])
    async with Fleet(redis_url, tmp_path, GYM_QUEUE_CONCURRENCY=16) as fleet:
        await fleet.start("gpu1", "cpu1", "beat")
        rows = 0
        for _ in range(4):
            with submitted(
                tmp_path, *ARGUMENTS, "--resume", GYM_QUEUE_REDIS_URL=redis_url, **WINDOW
            ) as command:
                rows = command.count() + chance.randint(1, 30)
                await asyncio.to_thread(command.reach, rows)
                command.process.kill()
        assert rows < EXAMPLES * SAMPLES
        await resumed_to_the_end(tmp_path, redis_url)
        assert await fleet.ledger.runs() == []


@pytest.mark.parametrize("nth", [1, 3])
async def test_killed_between_the_write_and_its_acknowledgement(
    tmp_path: Path, redis_url: str, nth: int
) -> None:
    write_input(tmp_path, [{"prompt": f"{number}?", "answer": "ok"} for number in range(EXAMPLES)])
    (tmp_path / "sitecustomize.py").write_text(DEADLY)
    async with Fleet(redis_url, tmp_path, GYM_QUEUE_CONCURRENCY=16) as fleet:
        await fleet.start("gpu1", "cpu1", "beat")
        (tmp_path / "dies_at").write_text(str(nth))
        with submitted(tmp_path, *ARGUMENTS, GYM_QUEUE_REDIS_URL=redis_url, **WINDOW) as command:
            assert await asyncio.to_thread(command.end) == -9
        (tmp_path / "dies_at").unlink()
        [status] = await fleet.ledger.runs()
        assert command.count() > status.archived, "rows that the ledger will bring again"
        await resumed_to_the_end(tmp_path, redis_url)
