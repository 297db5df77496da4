"""Work that is taken from a worker, or cancelled under it, stops within seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gym_queue.maintenance.cancel import cancel_run
from gym_queue.testing import async_wait_until
from tests.integration.fleet import Fleet

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(60)


async def test_a_cancelled_run_stops_what_is_being_generated(redis_url: str, tmp_path: Path) -> None:
    """The environment is told, the slots are free again, and the rest of the worker's rollouts go on."""
    async with Fleet(redis_url, tmp_path, GYM_QUEUE_CONCURRENCY=6) as fleet:
        await fleet.start("gpu")
        unwanted = await fleet.submit([{"wait": True}] * 4, run_id="unwanted")
        wanted = await fleet.submit([{"wait": True}] * 4, run_id="wanted")
        await fleet.in_flight("gpu", 6)
        assert await cancel_run(fleet.ledger, "unwanted", "changed my mind") == 4
        await fleet.collect(unwanted)
        await fleet.in_flight("gpu", 4)  # two more of those wanted: they have the slots now
        cancelled = tmp_path / "cancelled"
        await async_wait_until(lambda: len(cancelled.read_text()) == 4, what="the environment to be told")
        fleet.gate.touch()
        await fleet.collect(wanted)
        assert fleet.log("gpu", containing="Traceback") == []
    assert {row.state for row in unwanted.rows()} == {"cancelled"}
    assert {(row.state, row.attempt) for row in wanted.rows()} == {("succeeded", 1)}


async def test_a_cancelled_run_stops_its_verifiers(redis_url: str, tmp_path: Path) -> None:
    """A child that hangs in plain code is killed and replaced; that is no failure and no loss."""
    async with Fleet(redis_url, tmp_path) as fleet:
        fleet.launch("cpu", "workers.cpu", "worker", "-n", "cpu@%h", "--concurrency=2")
        await fleet.start("gpu")
        unwanted = await fleet.submit([{"queued": True, "verifier": "spins"}], run_id="unwanted")
        wanted = await fleet.submit([{"queued": True, "verifier": "waits"}], run_id="wanted")
        await fleet.in_flight("cpu", 2)
        before = fleet.children("cpu")
        assert await cancel_run(fleet.ledger, "unwanted", "changed my mind") == 1
        await fleet.collect(unwanted)
        await async_wait_until(lambda: fleet.children("cpu") != before, 20, what="a child to be replaced")
        assert len(before - fleet.children("cpu")) == 1
        more = await fleet.submit([{"queued": True, "verifier": "waits"}], run_id="more")
        await fleet.in_flight("cpu", 2)
        fleet.gate.touch()
        for run in (wanted, more):
            await fleet.collect(run)
            status = await fleet.ledger.run(run.spec.run_id)
            assert status is not None
            assert (status.succeeded, status.lost, status.retried) == (1, 0, 0)
        assert fleet.log("cpu") == []
