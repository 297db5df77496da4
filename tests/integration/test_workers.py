"""Real workers: ``celery -A workers.gpu worker`` and its colleagues as processes, on a real Redis."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

import pytest

from gym_queue.records import Stage
from gym_queue.testing import async_wait_until
from tests.integration.fleet import Fleet

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(90)


async def test_gpu_and_cpu_workers_serve_their_queues_without_flags(redis_url: str, tmp_path: Path) -> None:
    async with Fleet(redis_url, tmp_path) as fleet:
        await fleet.start("gpu", "cpu")
        queued = await fleet.submit([{"queued": True}] * 6, samples=2, run_id="queued")
        inline = await fleet.submit([{}] * 6, samples=2, run_id="inline")
        gpu = float(fleet.processes["gpu"].pid)
        for row in (await fleet.collect(inline)).rows():
            assert (row.state, row.attempt) == ("succeeded", 1)
            assert row.model_dump()["metrics"]["verified_by"] == gpu
            assert row.timings.verify_queued == 0.0
        for row in (await fleet.collect(queued)).rows():
            assert (row.state, row.attempt) == ("succeeded", 1)
            assert row.model_dump()["metrics"]["verified_by"] != gpu


async def test_one_gpu_worker_holds_2000_rollouts_at_once(redis_url: str, tmp_path: Path) -> None:
    """4,000 rollouts that sleep 5 s, 2,000 at once: 10 s, were there nothing else to do."""
    sleep, rollouts, slots = 5.0, 4000, 2000
    ideal = sleep * rollouts / slots
    async with Fleet(redis_url, tmp_path, GYM_QUEUE_CONCURRENCY=slots) as fleet:
        run = await fleet.submit(
            [{"prompt": "hello"}] * rollouts, environment="rows", model=f"stub:?delay={sleep}"
        )
        await fleet.start("gpu")
        await fleet.collect(run, timeout=60)
        memory = fleet.peak_memory("gpu")
    claims = [row.timings.accepted_at + (row.timings.queued or 0.0) for row in run.rows()]
    written = [
        int(event.position.split("-")[0]) / 1000 for event in run.events
    ]  # Redis' clock, as the claims'
    took = max(written) - min(claims)
    print(f"{took:.2f} s, {took / ideal:.3f} of the ideal; {memory:.0f} MB")  # noqa: T201 - shown on failure
    assert run.most_at_once() == slots
    assert memory < 500
    assert took <= 1.3 * ideal


async def test_a_gpu_worker_told_to_end_hands_its_rollouts_back(redis_url: str, tmp_path: Path) -> None:
    async with Fleet(redis_url, tmp_path, GYM_QUEUE_SHUTDOWN_GRACE=0.2) as fleet:
        await fleet.start("gpu1")
        name = await fleet.worker("gpu1")
        run = await fleet.submit([{"wait": True}] * 5, samples=4)
        await async_wait_until(lambda: _is(fleet.owned("gpu1"), 20), what="20 rollouts in flight")
        fleet.terminate("gpu1")
        assert await fleet.exit_status("gpu1") == 0
        assert await fleet.ledger.owned(name, None, 100) == []
        assert name not in {lease.worker for lease in await fleet.ledger.leases()}
        fleet.gate.touch()
        await fleet.start("gpu2")
        rows = (await fleet.collect(run)).rows()
    assert {(row.state, row.attempt) for row in rows} == {("succeeded", 2)}


async def _is(count: object, wanted: int) -> bool:
    return await count == wanted  # type: ignore[misc]
