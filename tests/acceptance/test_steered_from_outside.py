"""A real command whose run somebody else pauses, opens and cancels in the ledger."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from gym_queue.maintenance.cancel import cancel_run
from gym_queue.records import RunState
from gym_queue.testing import async_wait_until
from tests.acceptance.commands import check_each_once, metrics, output, submitted, write_input
from tests.integration.fleet import WORLD, Fleet

if TYPE_CHECKING:
    from pathlib import Path

    from gym_queue.records import RunStatus
    from tests.acceptance.commands import Command

EXAMPLES, SAMPLES, WINDOW = 40, 2, 16
ARGUMENTS = [
    "--model", "stub:", "--environment", WORLD, "--samples", str(SAMPLES),
    "--workers", "0", "--verifiers", "0",
]  # fmt: skip


async def at_the_gate(fleet: Fleet, command: Command) -> str:
    """Wait until a window of rollouts is under way; return the run's id."""

    async def full() -> bool:
        assert command.process.poll() is None, command.said
        return await fleet.owned("gpu1") == WINDOW

    await async_wait_until(full, 60, what="a window of rollouts to be under way")
    [status] = await fleet.ledger.runs()
    return status.spec.run_id


async def the_run(fleet: Fleet) -> RunStatus:
    [status] = await fleet.ledger.runs()
    return status


async def test_paused_and_opened(tmp_path: Path, redis_url: str) -> None:
    write_input(tmp_path, [{"wait": True} for _ in range(EXAMPLES)])
    async with Fleet(redis_url, tmp_path) as fleet:
        await fleet.start("gpu1", "cpu1", "beat")
        with submitted(
            tmp_path, *ARGUMENTS, GYM_QUEUE_REDIS_URL=redis_url, GYM_QUEUE_WINDOW=WINDOW
        ) as command:
            run_id = await at_the_gate(fleet, command)
            await fleet.ledger.set_run_state(run_id, RunState.PAUSED)
            fleet.gate.touch()
            await asyncio.to_thread(command.reach, WINDOW)
            await asyncio.to_thread(command.says, f"{WINDOW}/{EXAMPLES * SAMPLES} rollouts, paused")
            assert (await the_run(fleet)).accepted == WINDOW
            assert command.process.poll() is None
            await fleet.ledger.set_run_state(run_id, RunState.OPEN)
            assert await asyncio.to_thread(command.end) == 0, command.said
        check_each_once(tmp_path, EXAMPLES, SAMPLES)


@pytest.mark.parametrize("canceller_dies", [False, True])
async def test_cancelled(tmp_path: Path, redis_url: str, canceller_dies: bool) -> None:  # noqa: FBT001
    write_input(tmp_path, [{"wait": True} for _ in range(EXAMPLES)])
    async with Fleet(redis_url, tmp_path) as fleet:
        await fleet.start("gpu1")  # no beat: nobody sweeps
        with submitted(
            tmp_path, *ARGUMENTS, GYM_QUEUE_REDIS_URL=redis_url, GYM_QUEUE_WINDOW=WINDOW
        ) as command:
            run_id = await at_the_gate(fleet, command)
            if canceller_dies:
                await fleet.ledger.set_run_state(run_id, RunState.CANCELLED)
            else:
                await cancel_run(fleet.ledger, run_id, "a better idea")
            assert await asyncio.to_thread(command.end, 30) == 1, command.said
        total = EXAMPLES * SAMPLES
        assert (
            f"cancelled: {WINDOW} of {total} rollouts are in out.jsonl and out.failures.jsonl" in command.said
        )
        assert [row["state"] for row in output(tmp_path)] == ["cancelled"] * WINDOW
        found = metrics(tmp_path)
        assert (found["complete"], found["rollouts"]["cancelled"]) == (False, WINDOW)
        assert await fleet.ledger.runs() == []
        await async_wait_until(lambda: idle(fleet), 30, what="the worker to drop what was cancelled")
        fleet.gate.touch()
        with submitted(
            tmp_path, *ARGUMENTS, "--resume", "--retry", "cancelled", GYM_QUEUE_REDIS_URL=redis_url
        ) as command:
            assert await asyncio.to_thread(command.end) == 0, command.said
        check_each_once(tmp_path, EXAMPLES, SAMPLES)


async def idle(fleet: Fleet) -> bool:
    return await fleet.owned("gpu1") == 0
