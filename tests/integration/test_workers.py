"""Real workers: ``celery -A workers.gpu worker`` and its colleagues as processes, on a real Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import redis.asyncio as aioredis

from gym_queue import names
from gym_queue.records import Stage
from gym_queue.testing import async_wait_until
from tests.integration.fleet import IMPATIENT, Fleet, Run, command

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(90)


async def test_gpu_and_cpu_workers_serve_their_queues_without_flags(redis_url: str, tmp_path: Path) -> None:
    async with Fleet(redis_url, tmp_path) as fleet:
        await fleet.start("gpu", "cpu")
        queued = await fleet.submit([{"queued": True}] * 6, samples=2, run_id="queued")
        inline = await fleet.submit([{}] * 6, samples=2, run_id="inline")
        gpu = fleet.processes["gpu"].pid
        for row in (await fleet.collect(inline)).rows():
            assert (row.state, row.attempt) == ("succeeded", 1)
            assert row.model_dump()["metrics"]["verified_by"] == gpu
        for row in (await fleet.collect(queued)).rows():
            assert (row.state, row.attempt) == ("succeeded", 1)
            assert row.model_dump()["metrics"]["verified_by"] != gpu


SLEEP, ROLLOUTS, SLOTS = 5.0, 4000, 2000
IDEAL = SLEEP * ROLLOUTS / SLOTS
TRIES = 4


@pytest.mark.timeout(240)
async def test_one_gpu_worker_holds_2000_rollouts_at_once(redis_url: str, tmp_path: Path) -> None:
    """4,000 rollouts that sleep 5 s, 2,000 at once, would take 10 s if there were nothing else to do.

    The time is a ratio to that ideal: from the first claim to the last event, both on Redis' clock. Whatever
    else runs on the machine can only make it longer, so a worker that is too slow may try again.
    """
    ratios: list[float] = []
    variables = {"GYM_QUEUE_CONCURRENCY": SLOTS, "WORKER_HEARTBEAT_INTERVAL": 0.5}
    async with Fleet(redis_url, tmp_path, **variables) as fleet:

        async def all_slots_are_free() -> bool:
            (lease,) = await fleet.ledger.leases()
            return lease.info["used"] == "0"

        await fleet.start("gpu")
        while not ratios or (len(ratios) < TRIES and ratios[-1] > 1.3):
            run = await fleet.submit(
                [{"prompt": "hello"}] * ROLLOUTS,
                environment="rows",
                model=f"stub:?delay={SLEEP}",
                run_id=f"run{len(ratios)}",
            )
            await fleet.collect(run, timeout=40)
            assert run.most_at_once() == SLOTS
            await async_wait_until(all_slots_are_free)
            ratios.append(seconds(run) / IDEAL)
        memory = fleet.peak_memory("gpu")
    assert memory < 500
    assert min(ratios) <= 1.3


def seconds(run: Run) -> float:
    """Return how long a run took, from its first claim to its last event."""
    claims = [row.timings.accepted_at + (row.timings.queued or 0.0) for row in run.rows()]
    return max(int(event.position.split("-")[0]) for event in run.events) / 1000 - min(claims)


@pytest.mark.parametrize(("samples", "tickets"), [(8, 2), (7, 3)])
async def test_slots_count_rollouts_and_the_rest_waits_in_the_broker(
    redis_url: str, tmp_path: Path, samples: int, tickets: int
) -> None:
    """16 slots take tickets while one is free: two of 8 samples, or three of 7, past the 16th."""
    async with Fleet(redis_url, tmp_path, GYM_QUEUE_CONCURRENCY=16) as fleet:
        run = await fleet.submit([{"wait": True}] * 12, samples=samples)
        await fleet.start("gpu")
        await fleet.in_flight("gpu", tickets * samples)
        # One ticket may be in the worker's hands already, popped by the request that was under way.
        assert await fleet.broker.depth(Stage.GENERATE) in (12 - tickets, 12 - tickets - 1)
        assert await fleet.owned("gpu") == tickets * samples
        fleet.gate.touch()
        await fleet.collect(run)
    assert run.most_at_once() <= 16 + samples - 1


async def test_a_worker_renews_its_lease_and_answers_while_its_event_loop_is_blocked(
    redis_url: str, tmp_path: Path
) -> None:
    variables = {"WORKER_HEARTBEAT_INTERVAL": 0.2, "GYM_QUEUE_CONCURRENCY": 2}
    async with Fleet(redis_url, tmp_path, **variables) as fleet:
        await fleet.start("gpu")
        run = await fleet.submit([{"block": True}] * 4)
        await async_wait_until(fleet.blocked.exists, 30, what="a rollout that blocks the event loop")
        for _ in range(3):
            previous = (await fleet.ledger.leases())[0].age

            async def renewed() -> bool:
                nonlocal previous
                age = (await fleet.ledger.leases())[0].age
                younger, previous = age < previous, age
                return younger

            await async_wait_until(renewed, what="the lease to be renewed")
        answer = await command(fleet, "-A", "workers.gpu", "inspect", "ping")
        assert answer.count("pong") == 1
        assert not run.events
        fleet.gate.touch()
        await fleet.collect(run)


@pytest.mark.guarantee("G4")
async def test_a_queue_emptied_by_hand_is_filled_again(redis_url: str, tmp_path: Path) -> None:
    async with Fleet(redis_url, tmp_path, **IMPATIENT) as fleet:
        run = await fleet.submit([{"queued": True}] * 10, samples=3)
        async with aioredis.Redis.from_url(redis_url) as client:
            assert await client.delete(names.ROLLOUT_QUEUE) == 1
        assert await fleet.broker.depth(Stage.GENERATE) == 0
        await fleet.start("gpu", "cpu", "beat")
        rows = (await fleet.collect(run)).rows()
    assert {(row.state, row.attempt) for row in rows} == {("succeeded", 1)}
