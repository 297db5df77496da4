"""Workers, and children of their pools, that die, hang or come back from the dead."""

from __future__ import annotations

import os
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.records import Stage
from gym_queue.testing import async_wait_until
from tests.integration.fleet import IMPATIENT, Fleet

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(120)

CPU = ("workers.cpu", "worker", "-n", "cpu@%h", "--concurrency=2")


@asynccontextmanager
async def frozen(fleet: Fleet, name: str, seconds: float) -> AsyncIterator[None]:
    """Stop a worker and its children for so long, by the ledger's clock."""

    async def long_enough() -> bool:
        return await fleet.age(name) > before + seconds

    os.killpg(fleet.processes[name].pid, signal.SIGSTOP)
    before = await fleet.age(name)
    try:
        await async_wait_until(long_enough, 30, what=f"{name} to have stood still")
        yield
    finally:
        os.killpg(fleet.processes[name].pid, signal.SIGCONT)


async def test_rollouts_of_a_killed_gpu_worker_run_elsewhere(redis_url: str, tmp_path: Path) -> None:
    async with Fleet(redis_url, tmp_path, **IMPATIENT) as fleet:
        await fleet.start("gpu1", "cpu", "beat")
        name = await fleet.worker("gpu1")
        run = await fleet.submit([{"wait": True, "queued": True}] * 5, samples=4)
        await fleet.in_flight("gpu1", 20)
        fleet.signal("gpu1", signal.SIGKILL)
        fleet.gate.touch()
        await fleet.start("gpu2")
        rows = (await fleet.collect(run)).rows()
        assert name not in {lease.worker for lease in await fleet.ledger.leases()}
    assert {(row.state, row.attempt) for row in rows} == {("succeeded", 2)}


DEATHS: list[dict[str, Any]] = [
    {"verifier": "exits", "status": 3},
    {"verifier": "exits", "status": 0},
    {"verifier": "kills", "signal": signal.SIGKILL},
    {"verifier": "kills", "signal": signal.SIGSEGV},
]
LAST_WORDS = ["exit status 3", "exit status 0", "killed by SIGKILL", "killed by SIGSEGV"]


async def test_a_verifier_that_dies_is_reported_by_its_parent(redis_url: str, tmp_path: Path) -> None:
    """No beat here, so no sweep: nobody but the parent can end these. Those beside them do not suffer."""
    async with Fleet(redis_url, tmp_path) as fleet:
        await fleet.start("gpu", "cpu")
        rows = [{"queued": True} | death for death in DEATHS] + [{"queued": True}] * 4
        run = await fleet.collect(await fleet.submit(rows, limits={"max_attempts": 2}))
        status = await fleet.ledger.run("run")
        log = fleet.log("cpu")
    ends = sorted((row.model_dump() for row in run.rows()), key=lambda row: row["example_index"])
    assert [end["state"] for end in ends] == ["failed"] * 4 + ["succeeded"] * 4
    for end, words in zip(ends, LAST_WORDS, strict=False):
        assert (end["class"], end["stage"]) == ("infrastructure", Stage.VERIFY)
        assert words in end["error"]
        assert end["messages"], "what was generated is kept"
    assert status is not None
    assert status.lost == 4, "each had two deaths; the second one failed it"
    assert log == []


async def test_a_death_is_noticed_at_once(redis_url: str, tmp_path: Path) -> None:
    """Ten deaths in a row; Celery by itself would look after most of them 5 s late."""
    async with Fleet(redis_url, tmp_path) as fleet:
        await fleet.start("gpu", "cpu")
        row = {"queued": True, "verifier": "exits", "status": 1}
        await fleet.collect(await fleet.submit([row], limits={"max_attempts": 10}), timeout=15)


@pytest.mark.guarantee("G7")
async def test_a_verifier_that_hangs_is_killed_at_its_runs_limit(redis_url: str, tmp_path: Path) -> None:
    """The worker's own limit is 120 s, and there is no sweep. Afterwards the pool is whole again."""
    async with Fleet(redis_url, tmp_path) as fleet:
        fleet.launch("cpu", *CPU)
        await fleet.start("gpu")
        hung = [{"queued": True, "verifier": verifier} for verifier in ("spins", "sleeps", "spins")]
        limits = {"verify_timeout": 0.5, "max_attempts": 2}
        run = await fleet.collect(await fleet.submit(hung, run_id="hung", limits=limits))
        again = await fleet.submit([{"queued": True, "verifier": "waits"}] * 2, run_id="again")
        await fleet.in_flight("cpu", 2)
        fleet.gate.touch()
        await fleet.collect(again)
    for row in run.rows():
        end = row.model_dump()
        assert (end["class"], end["stage"]) == ("timeout", Stage.VERIFY)
        assert end["error"] == "verifying took longer than 0.5 s"
        assert end["messages"], "what was generated is kept"


async def test_a_full_pool_of_verifiers_delays_no_sweep(redis_url: str, tmp_path: Path) -> None:
    async with Fleet(redis_url, tmp_path, **IMPATIENT) as fleet:
        fleet.launch("cpu", *CPU)
        await fleet.start("gpu1", "beat")
        await fleet.submit([{"queued": True, "verifier": "sleeps"}] * 10, run_id="hung")
        await fleet.in_flight("cpu", 2)
        run = await fleet.submit([{"wait": True}] * 10)
        await fleet.in_flight("gpu1", 10)
        fleet.signal("gpu1", signal.SIGKILL)
        fleet.gate.touch()
        await fleet.start("gpu2")
        rows = (await fleet.collect(run)).rows()
        assert await fleet.owned("cpu") == 2
    assert {(row.state, row.attempt) for row in rows} == {("succeeded", 2)}


@pytest.mark.guarantee("G2")
async def test_a_worker_that_comes_back_changes_nothing_and_works_on(redis_url: str, tmp_path: Path) -> None:
    async with Fleet(redis_url, tmp_path, **IMPATIENT) as fleet:
        await fleet.start("gpu1", "cpu", "beat")
        run = await fleet.submit([{"wait": True}] * 5, samples=4)
        await fleet.in_flight("gpu1", 20)
        fleet.signal("gpu1", signal.SIGSTOP)
        await fleet.start("gpu2")
        await fleet.in_flight("gpu2", 20)
        fleet.gate.touch()
        await fleet.collect(run)
        fleet.signal("gpu2", signal.SIGTERM)
        assert await fleet.exit_status("gpu2") == 0

        fleet.signal("gpu1", signal.SIGCONT)  # and it goes on at once: the gate is open

        async def late_commits() -> int:
            status = await fleet.ledger.run("run")
            return status.refused if status else 0

        await async_wait_until(late_commits, 10, what="late commits to be refused")
        after = await fleet.submit([{}] * 5, run_id="after")
        await fleet.collect(after)
        await async_wait_until(lambda: fleet.log("gpu1", containing="had been given up"), 10)
        assert len(fleet.log("gpu1", containing="had been given up")) == 1
        assert await fleet.ledger.events("run", run.events[-1].position, 10, 0.0) == []
    assert {(row.state, row.attempt) for row in run.rows()} == {("succeeded", 2)}


async def test_verifiers_of_a_worker_that_comes_back_are_stopped(redis_url: str, tmp_path: Path) -> None:
    """Its parent was silent for too long; the child goes on with work that is another's now."""
    async with Fleet(redis_url, tmp_path, **IMPATIENT) as fleet:
        await fleet.start("gpu", "cpu1", "beat")
        run = await fleet.submit([{"queued": True, "verifier": "waits"}])
        await fleet.in_flight("cpu1", 1)
        before = fleet.children("cpu1")
        fleet.signal("cpu1", signal.SIGSTOP)
        await fleet.start("cpu2")
        await fleet.in_flight("cpu2", 1)
        fleet.signal("cpu1", signal.SIGCONT)
        await async_wait_until(lambda: fleet.children("cpu1") != before, 20, what="the child to be replaced")
        fleet.gate.touch()
        (row,) = (await fleet.collect(run)).rows()
        status = await fleet.ledger.run("run")
        assert status is not None
        assert status.lost == 1, "the parent reports no loss of what is not its own"
        assert fleet.log("cpu1", containing="Traceback") == []
    assert (row.state, row.attempt) == ("succeeded", 1)


async def test_a_worker_that_stood_still_blames_no_rollout(redis_url: str, tmp_path: Path) -> None:
    """Its clock ran on, past the time of what it waits for. No sweep here: it is not given up meanwhile."""
    async with Fleet(redis_url, tmp_path) as fleet:
        await fleet.start("gpu", "cpu")
        run = await fleet.submit([{"wait": True}] * 5, samples=4, limits={"tool_timeout": 4.0})
        await fleet.begun(20)
        async with frozen(fleet, "gpu", 7.0):
            pass

        async def tried_again() -> bool:
            owned = await fleet.ledger.owned(await fleet.worker("gpu"), None, 100)
            return [attempt.fence.attempt for attempt in owned] == [2] * 20

        await async_wait_until(tried_again, what="second attempts")
        fleet.gate.touch()
        rows = (await fleet.collect(run)).rows()
    assert {(row.state, row.attempt) for row in rows} == {("succeeded", 2)}


async def test_a_verifier_loses_no_time_by_a_worker_that_stood_still(redis_url: str, tmp_path: Path) -> None:
    async with Fleet(redis_url, tmp_path, WORKER_HEARTBEAT_INTERVAL=0.1) as fleet:
        await fleet.start("gpu", "cpu")
        row = {"queued": True, "verifier": "waits"}
        run = await fleet.submit([row], limits={"verify_timeout": 2.0, "max_attempts": 1})
        await fleet.in_flight("cpu", 1)
        async with frozen(fleet, "cpu", 5.0):
            pass

        async def renewed() -> bool:
            return await fleet.age("cpu") < 1.0

        await async_wait_until(renewed, what="it to be back")
        fleet.gate.touch()
        rows = (await fleet.collect(run)).rows()
    assert [(row.state, row.attempt) for row in rows] == [("succeeded", 1)]
