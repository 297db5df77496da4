"""What one process of a head is made of: who drives a run tells those who follow it, and hears from those who
append to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gym_queue.api import RunRequest
from gym_queue.head import watching
from gym_queue.head.services import opened
from gym_queue.records import RunState
from gym_queue.settings import Settings
from gym_queue.testing import async_wait_until

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


async def test_followers_of_a_run_that_is_driven_here_wait_for_no_look(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "INTERVAL", 3600.0)
    settings = Settings(redis_url=redis_url, runs_dir=str(tmp_path), num_expected_workers=0)
    async with opened(settings) as services:
        view, _ = await services.runs.create(RunRequest(model="stub:"), "key")
        async with services.watchers.of(services.folder(view.run_id).paths.run_dir) as watch:
            await services.runs.close(view.run_id)
            await async_wait_until(
                lambda: watch.newest is not None and watch.newest.state is RunState.ENDED, 20
            )
        assert services.watchers.looks == 0


async def test_examples_for_a_run_that_is_driven_here_wait_for_no_look(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_PATIENCE", "_SOON"):
        monkeypatch.setattr(f"gym_queue.coordinator.feeder.{name}", 3600.0)
    settings = Settings(redis_url=redis_url, runs_dir=str(tmp_path), num_expected_workers=0)
    async with opened(settings) as services:
        view, _ = await services.runs.create(RunRequest(model="stub:"), "key")
        for count in (1, 2, 3):
            await services.runs.append(view.run_id, b'{"prompt": "?", "answer": "!"}')

            async def accepted(count: int = count) -> bool:
                return (await services.runs.show(view.run_id)).accepted == count

            await async_wait_until(accepted, 20)
