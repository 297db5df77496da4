"""The head that leads is killed, or told to end, while real workers generate: another goes on (G1, G3)."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import redis.asyncio as aioredis

from gym_queue import names
from gym_queue.api import RunRequest
from gym_queue.coordinator.runs import Runs
from gym_queue.embedded.children import spawn
from gym_queue.environments.base import Environment
from gym_queue.maintenance.cancel import cancel_run
from gym_queue.records import RunState
from gym_queue.settings import Settings
from gym_queue.testing import async_wait_until
from tests.integration.fleet import IMPATIENT, WORLD, Fleet

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SAMPLES = 2


class Heads:
    """Leaders in processes of their own, and the runs as another head would see them."""

    def __init__(self, fleet: Fleet, redis_url: str, folder: Path) -> None:
        self.fleet = fleet
        self.folder = folder
        self.client = aioredis.Redis.from_url(redis_url)
        self.runs = Runs(
            fleet.ledger,
            folder,
            Settings(redis_url=redis_url),
            environments=lambda _: Environment(),
            check_model=lambda _: None,
            cancel=partial(cancel_run, fleet.ledger, reason="the run was cancelled"),
        )

    def start(self, name: str) -> None:
        argv = [sys.executable, "-m", "tests.integration.leading"]
        log = self.fleet.folder / f"{name}.log"
        environment = {**self.fleet.variables, "GYM_QUEUE_RUNS_DIR": str(self.folder)}
        self.fleet.processes[name] = spawn(argv, log, environment=environment, cwd=self.fleet.folder)

    async def leads(self, name: str) -> bool:
        holder = str(await self.client.get(names.office_key(names.COORDINATOR_OFFICE)))
        return f"/{self.fleet.processes[name].pid}-" in holder

    async def stands_by(self, name: str) -> None:
        """Wait until a process has all it needs to lead, but the office."""
        log = partial(self.fleet.log, name, containing="waits for its turn")
        await async_wait_until(log, 30, what=f"{name} to wait for its turn")

    async def now(self) -> float:
        """Return the time on the ledger's clock."""
        seconds, microseconds = await self.client.time()
        return float(seconds) + microseconds / 1e6

    async def follows(self, name: str) -> float:
        """Wait until a process leads; return how long that took, in seconds of the ledger's clock."""
        begun = await self.now()
        await async_wait_until(partial(self.leads, name), 30, what=f"{name} to lead")
        return await self.now() - begun

    async def archived(self, run_id: str) -> int:
        return (await self.runs.show(run_id)).archived

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        files = ("rollouts.jsonl", "rollouts.failures.jsonl")
        texts = [(self.folder / run_id / name).read_text() for name in files]
        return [json.loads(line) for text in texts for line in text.splitlines()]


@asynccontextmanager
async def heads(redis_url: str, tmp_path: Path, **variables: object) -> AsyncIterator[Heads]:
    async with Fleet(redis_url, tmp_path, **IMPATIENT | variables) as fleet:
        several = Heads(fleet, redis_url, tmp_path / "runs")
        try:
            yield several
        finally:
            several.runs.close_threads()
            await several.client.aclose()


def rows(count: int, **fields: Any) -> bytes:
    return b"".join(json.dumps({"environment": WORLD} | fields).encode() + b"\n" for _ in range(count))


@pytest.mark.guarantee("G1", "G3")
async def test_g3_a_leader_that_is_killed_is_followed_within_seconds_and_nothing_is_lost_or_doubled(
    redis_url: str, tmp_path: Path
) -> None:
    async with heads(redis_url, tmp_path, GYM_QUEUE_WINDOW=64) as several:
        fleet = several.fleet
        several.start("first")
        await several.follows("first")
        several.start("second")
        view, _ = await several.runs.create(RunRequest(model="stub:", samples=SAMPLES))
        run_id = view.run_id
        await several.runs.append(run_id, rows(100) + rows(10, wait=True) + rows(200), 0)

        async def waits_for_workers() -> bool:
            return "expected worker" in ((await several.runs.show(run_id)).waiting_for or "")

        await async_wait_until(waits_for_workers, 20, what="the run to say that it waits for workers")
        await fleet.start("gpu")
        await async_wait_until(lambda: _more_than(several, run_id, 100), 60, what="the run's middle")
        assert (await several.runs.show(run_id)).waiting_for is None
        await several.stands_by("second")

        fleet.signal("first", signal.SIGKILL)
        assert await several.follows("second") < 10.0
        await several.runs.append(run_id, rows(40), 310)
        await several.runs.close(run_id)
        fleet.gate.touch()

        async def is_over() -> bool:
            """The ledger forgets after the end was written."""
            ended = (await several.runs.show(run_id)).state is RunState.ENDED
            return ended and await fleet.ledger.runs() == []

        await async_wait_until(is_over, 60, what="the end of the run")
        view = await several.runs.show(run_id)
        assert (view.accepted, view.succeeded, view.groups.complete) == (350 * SAMPLES, 350 * SAMPLES, 350)
        places = Counter((row["example_index"], row["sample_index"]) for row in several.rows(run_id))
        assert set(places) == {(index, sample) for index in range(350) for sample in range(SAMPLES)}
        assert set(places.values()) == {1}


async def _more_than(several: Heads, run_id: str, rollouts: int) -> bool:
    return await several.archived(run_id) > rollouts


async def test_a_leader_that_is_told_to_end_makes_room_at_once(redis_url: str, tmp_path: Path) -> None:
    async with heads(redis_url, tmp_path, NUM_EXPECTED_WORKERS=0) as several:
        several.start("first")
        await several.follows("first")
        several.start("second")
        view, _ = await several.runs.create(RunRequest(model="stub:"))
        await several.runs.append(view.run_id, rows(1))
        await async_wait_until(partial(several.fleet.ledger.run, view.run_id), 20, what="the open run")
        await several.stands_by("second")
        several.fleet.signal("first", signal.SIGTERM)
        assert await several.follows("second") < 4.0  # sooner than the term of five seconds could end
        assert await several.fleet.exit_status("first") == 0
