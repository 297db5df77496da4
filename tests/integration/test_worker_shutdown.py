"""How workers end: they stop pulling, finish or hand back within the grace period, and exit with 0."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.embedded.redis import RedisServer
from gym_queue.records import Stage
from gym_queue.testing import async_wait_until
from tests.integration.fleet import Fleet

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(90)

GENERATES: tuple[str, dict[str, Any]] = ("gpu", {"wait": True})
VERIFIES: tuple[str, dict[str, Any]] = ("cpu", {"queued": True, "verifier": "waits"})
KINDS = pytest.mark.parametrize(("kind", "row"), [GENERATES, VERIFIES], ids=["gpu", "cpu"])


async def start(fleet: Fleet, kind: str, name: str) -> None:
    """Start the worker that is to end, and what its rollouts need before it."""
    concurrency = ["--concurrency=2"] if kind == "cpu" else []
    fleet.launch(name, f"workers.{kind}", "worker", "-n", f"{name}@%h", *concurrency)
    await fleet.start(*(["gpu"] if kind == "cpu" else []))
    await fleet.leased(name)


@KINDS
async def test_what_ends_within_the_grace_period_is_kept(
    redis_url: str, tmp_path: Path, kind: str, row: dict[str, Any]
) -> None:
    async with Fleet(redis_url, tmp_path, GYM_QUEUE_SHUTDOWN_GRACE=30) as fleet:
        await start(fleet, kind, "old")
        run = await fleet.submit([row] * 2)
        await fleet.in_flight("old", 2)
        fleet.signal("old", signal.SIGTERM)
        await fleet.stopped_pulling("old")
        fleet.gate.touch()
        assert await fleet.exit_status("old") == 0
        await fleet.collect(run)
        assert fleet.log("old", containing="Traceback") == []
    assert {(row.state, row.attempt) for row in run.rows()} == {("succeeded", 1)}


AT_ONCE = {"gpu": signal.SIGTERM, "cpu": signal.SIGINT}


@KINDS
@pytest.mark.parametrize(("grace", "times"), [(0.2, 1), (60, 2)], ids=["after the grace", "at once"])
async def test_the_rest_is_handed_back(
    redis_url: str, tmp_path: Path, kind: str, row: dict[str, Any], grace: float, times: int
) -> None:
    """After the grace period, or at a second signal (Ctrl-C means the same). It is nobody's failure: one
    attempt is enough.
    """
    async with Fleet(redis_url, tmp_path, GYM_QUEUE_SHUTDOWN_GRACE=grace) as fleet:
        await start(fleet, kind, "old")
        name = await fleet.worker("old")
        run = await fleet.submit([row] * 2, limits={"max_attempts": 1})
        await fleet.in_flight("old", 2)
        for _ in range(times):
            fleet.signal("old", signal.SIGTERM if times == 1 else AT_ONCE[kind])
            await fleet.stopped_pulling("old")
        assert await fleet.exit_status("old", 20) == 0
        assert await fleet.ledger.owned(name, None, 100) == []
        assert name not in {lease.worker for lease in await fleet.ledger.leases()}
        assert fleet.log("old", containing="Traceback") == []
        fleet.gate.touch()
        await fleet.start(f"{kind}2")
        await fleet.collect(run)
        status = await fleet.ledger.run("run")
        assert status is not None
        assert (status.retried, status.lost) == (0, 0)
    assert {row.state for row in run.rows()} == {"succeeded"}


@KINDS
@pytest.mark.parametrize("noticed", [False, True], ids=["just now", "noticed"])
async def test_a_worker_ends_while_redis_is_away(
    tmp_path: Path, kind: str, row: dict[str, Any], *, noticed: bool
) -> None:
    """Whether it is told so while it waits for the broker, or learns at its end that there is none."""
    with RedisServer(tmp_path / "redis") as server:
        async with Fleet(server.url, tmp_path, GYM_QUEUE_SHUTDOWN_GRACE=0.2) as fleet:
            await start(fleet, kind, "old")
            await fleet.submit([row] * 2)
            await fleet.in_flight("old", 2)
            assert server.process is not None
            server.process.kill()
            server.process.wait()
            if noticed:
                await async_wait_until(lambda: fleet.log("old", containing="the broker cannot be used"), 20)
            fleet.signal("old", signal.SIGTERM)
            assert await fleet.exit_status("old", 20) == 0
            assert fleet.log("old", containing="Traceback") == []


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
async def test_a_worker_ends_that_never_reached_its_broker(tmp_path: Path, kind: str) -> None:
    async with Fleet(f"unix://{tmp_path}/redis.sock?db=0", tmp_path) as fleet:
        fleet.launch("old", f"workers.{kind}", "worker", "-n", "old@%h")
        await async_wait_until(
            lambda: fleet.log("old", containing="the broker cannot be used"), 60, what="it to wait"
        )
        fleet.signal("old", signal.SIGTERM)
        assert await fleet.exit_status("old", 20) == 0
        assert fleet.log("old", containing="Traceback") == []


async def test_a_signal_at_the_very_end_changes_nothing(redis_url: str, tmp_path: Path) -> None:
    """Python gives up its signal handlers before it clears its modules, which takes a moment."""
    async with Fleet(redis_url, tmp_path) as fleet:
        await fleet.start("gpu")
        await fleet.collect(await fleet.submit([{"told late": [signal.SIGTERM, signal.SIGINT]}]))
        fleet.signal("gpu", signal.SIGTERM)
        assert await fleet.exit_status("gpu", 20) == 0
        assert (tmp_path / "told").read_text() == "late"


@pytest.mark.parametrize("row", [{"block": True}, {"thread": True}], ids=["event loop", "exit"])
async def test_a_rollout_that_blocks_its_worker_cannot_keep_it(
    redis_url: str, tmp_path: Path, row: dict[str, Any]
) -> None:
    """Plain code holds the event loop, or a thread that Python waits for at its exit: it cannot be cancelled,
    but its rollout is handed back.
    """
    async with Fleet(redis_url, tmp_path, GYM_QUEUE_SHUTDOWN_GRACE=0.2) as fleet:
        await fleet.start("gpu1")
        name = await fleet.worker("gpu1")
        await fleet.submit([row])
        await fleet.in_flight("gpu1", 1)
        fleet.signal("gpu1", signal.SIGTERM)
        assert await fleet.exit_status("gpu1", 25) == 0
        assert await fleet.ledger.owned(name, None, 100) == []
        assert await fleet.broker.depth(Stage.GENERATE) >= 1
        status = await fleet.ledger.run("run")
        assert status is not None
        assert status.queued == 1
