"""Heads in one event loop: each with its runs and its leader, over one folder, one ledger and one worker."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from gym_queue.coordinator import progress
from gym_queue.coordinator.driver import Means
from gym_queue.coordinator.leader import Leader
from gym_queue.coordinator.muster import Muster
from gym_queue.coordinator.run_folder import RunFolder
from gym_queue.coordinator.runs import Runs
from gym_queue.maintenance.cancel import cancel_run, cancel_samples
from gym_queue.settings import Settings
from gym_queue.testing import async_wait_until
from tests.unit.road import World
from tests.unit.small_stack import Stack, hurry
from tests.unit.test_inbox import body
from tests.unit.test_source import _Counted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    import pytest

    from gym_queue.api import RunRequest, RunView
    from gym_queue.coordinator.progress import Written
    from gym_queue.environments.base import Environment
    from gym_queue.ledger.base import Ledger
    from gym_queue.records import RunState

SETTINGS = Settings()


def hurry_leaders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what looks now and then look all the time."""
    hurry(monkeypatch)
    for name in (
        "driver._LOCK_PAUSE",
        "driver._MUSTER_PAUSE",
        "driver._WISH_INTERVAL",
        "driver._FIRST_PAUSE",
    ):
        monkeypatch.setattr(f"gym_queue.coordinator.{name}", 0.01)
    monkeypatch.setattr("gym_queue.coordinator.muster._REFRESH_INTERVAL", 0.0)
    monkeypatch.setattr("gym_queue.coordinator.leader._LOOK_INTERVAL", 0.01)


def environments(name: str) -> Environment:
    return _Counted(brings=1000) if name == "counted" else World()


class Head:
    """One head. ``quiet``: its leader learns of runs from the folder only, as of those of other heads.
    ``ledger``: as this head sees it.
    """

    def __init__(
        self,
        stack: Stack,
        folder: Path,
        *,
        expected: int = 0,
        term: float = 60.0,
        quiet: bool = False,
        ledger: Ledger | None = None,
    ) -> None:
        ledger = ledger or stack.ledger
        cancel = partial(cancel_run, ledger, reason="the run was cancelled")
        self.folder = folder
        self.heard: list[tuple[Path, Written]] = []
        self.runs = Runs(
            ledger,
            folder,
            SETTINGS,
            environments=environments,
            check_model=lambda _: None,
            cancel=cancel,
        )
        means = Means(
            ledger=ledger,
            publisher=stack.queues,
            muster=Muster(ledger, expected),
            window=8,
            environments=environments,
            cancel=cancel,
            cancel_samples=partial(cancel_samples, ledger),
            driving=self._driving,
        )
        changed = asyncio.Event() if quiet else self.runs.changed
        self.leader = Leader(folder, means, changed, term=term, interval=min(0.01, term / 10))
        if not quiet:
            self.runs.on_examples = self.leader.more_examples

    @asynccontextmanager
    async def up(self) -> AsyncIterator[asyncio.Task[None]]:
        """Let it lead beside the test; gives the task, which may be cancelled: that is its SIGTERM."""
        task = asyncio.create_task(self.leader.run())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.runs.close_threads()

    @contextmanager
    def _driving(self, run_dir: Path) -> Iterator[Callable[[Written], None]]:
        def hear(written: Written) -> None:
            assert progress.read(run_dir) == written  # who hears of it finds it
            self.heard.append((run_dir, written))

        yield hear

    async def submit(self, request: RunRequest, *prompts: str) -> RunView:
        """Make a run with these examples, and close it."""
        view, _ = await self.runs.create(request)
        await self.runs.append(view.run_id, body(*prompts))
        return await self.runs.close(view.run_id)

    async def until(self, run_id: str, state: RunState) -> RunView:
        """Wait until a run is in a state, and, where that is final, all of it is written."""

        async def reached() -> bool:
            return (await self.runs.show(run_id)).state is state

        await async_wait_until(reached, 20, what=f"run {run_id} to be {state}")
        return await self.runs.show(run_id)

    async def done(self, run_id: str) -> RunView:
        """Wait until a run is over."""
        written = RunFolder(self.folder / run_id).written
        await async_wait_until(lambda: written().final, 20, what=f"the end of run {run_id}")
        return await self.runs.show(run_id)

    async def waits_for(self, run_id: str, words: str) -> None:
        """Wait until a run says that it waits for something."""

        async def said() -> bool:
            return words in ((await self.runs.show(run_id)).waiting_for or "")

        await async_wait_until(said, 20, what=f"run {run_id} to wait for {words}")

    def metrics(self, run_id: str) -> dict[str, Any]:
        """Return what the run's file of metrics says."""
        content = (self.folder / run_id / "rollouts.metrics.json").read_text()
        metrics: dict[str, Any] = json.loads(content)
        return metrics

    def places(self, run_id: str) -> list[tuple[int, int]]:
        """Return example and sample of each whole row in the run's files, if they are there, sorted."""
        files = [self.folder / run_id / name for name in ("rollouts.jsonl", "rollouts.failures.jsonl")]
        texts = [path.read_bytes() for path in files if path.exists()]
        lines = [line for text in texts for line in text.splitlines(keepends=True)]
        rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
        return sorted((row["example_index"], row["sample_index"]) for row in rows)
