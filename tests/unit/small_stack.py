"""A whole stack in one event loop for tests of the coordinator: ledger, broker, worker, sweep, files."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from gym_queue.coordinator.archive import Archive
from gym_queue.coordinator.groups import Groups
from gym_queue.coordinator.metrics import Metrics
from gym_queue.coordinator.progress import ProgressFile
from gym_queue.coordinator.run import Coordinator
from gym_queue.errors import LedgerError
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.maintenance.audit import audit
from gym_queue.maintenance.cancel import cancel_run, cancel_samples
from gym_queue.maintenance.reap import reap
from gym_queue.pipeline import Pipeline
from gym_queue.records import Example, Limits, RunSpec, Stage, Ticket
from tests.unit.road import RUN, Engine, World

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path

    import pytest

    from gym_queue.coordinator.run import Progress
    from gym_queue.environments.base import Environment
    from gym_queue.ledger.base import Event, Ledger
    from gym_queue.records import Group, RunStatus

SAMPLES = 2


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what waits out a ledger or a disk, or looks now and then, wait next to nothing."""
    monkeypatch.setattr("gym_queue.coordinator.patience._FIRST_PAUSE", 0.0)
    monkeypatch.setattr("gym_queue.pipeline.random.random", lambda: 0.0)
    monkeypatch.setattr("gym_queue.coordinator.run._DUE_INTERVAL", 0.01)
    monkeypatch.setattr("gym_queue.coordinator.feeder._PATIENCE", 0.01)
    monkeypatch.setattr("gym_queue.coordinator.aggregator._WAIT", 0.01)
    monkeypatch.setattr("gym_queue.coordinator.room._PAUSE", 0.01)


class Examples:
    """A source of ``count`` examples, which may grow while it is not ``closed``."""

    fingerprint = "examples"

    def __init__(self, count: int, *, closed: bool = True) -> None:
        self.count = count
        self.closed = closed

    def examples(self, start: int) -> Iterator[Example]:
        for index in range(start, self.count):
            yield Example(id=f"e{index}", environment="world", row={"prompt": str(index)})


class Queues:
    """Publisher and broker in one."""

    def __init__(self) -> None:
        self.tickets: asyncio.Queue[Ticket] = asyncio.Queue()
        self._depths: Counter[Stage] = Counter()

    async def publish(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            self._depths[ticket.stage] += 1
            self.tickets.put_nowait(ticket)

    async def take(self) -> Ticket:
        ticket = await self.tickets.get()
        self._depths[ticket.stage] -= 1
        return ticket

    async def depth(self, stage: Stage) -> int:
        return self._depths[stage]


class Stack:
    """Everything but the coordinator. ``ledger`` is what the coordinator sees, and the worker too."""

    def __init__(
        self, *, ledger: Ledger | None = None, engine: Engine | None = None, world: Environment | None = None
    ) -> None:
        self.ledger: Ledger = ledger or MemoryLedger()
        self.queues = Queues()
        self.engine = engine or Engine()

        async def get_engine(_: str) -> Engine:
            return self.engine

        environment = world or World(inline=False)
        self.pipeline = Pipeline(self.ledger, self.queues, get_engine, lambda _: environment, worker="worker")

    @asynccontextmanager
    async def up(self, *, sweep: bool = True) -> AsyncIterator[None]:
        """Run a worker and a sweep beside the test."""
        tasks = [asyncio.create_task(self._work())]
        if sweep:
            tasks.append(asyncio.create_task(self._sweep()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as running:
            while True:
                running.create_task(self._serve(await self.queues.take()))

    async def _serve(self, ticket: Ticket) -> None:
        serve = self.pipeline.generate if ticket.stage is Stage.GENERATE else self.pipeline.verify
        with suppress(LedgerError):  # the ticket is lost, as when a task fails
            await serve(ticket)

    async def _sweep(self) -> None:
        while True:
            with suppress(LedgerError):
                await self.ledger.heartbeat("worker", {})
                self.pipeline.drop(await self.ledger.revoked("worker", 1000))
                await reap(self.ledger, self.queues, 3600.0)
                await audit(self.ledger, self.queues, self.queues, 0.0)
            await asyncio.sleep(0.005)


class WatchedLedger(MemoryLedger):
    """Remembers how many rollouts were ever open at once and how often it was asked for runs; can hide the
    results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most_open: dict[str, int] = {}
        self.accepted: list[tuple[int, int]] = []
        self.looks = 0
        self.hidden = False

    async def runs(self) -> list[RunStatus]:
        self.looks += 1
        return await super().runs()

    async def accept(
        self, run_id: str, cursor: int, next_cursor: int, groups: Sequence[Group]
    ) -> list[Ticket]:
        tickets = await super().accept(run_id, cursor, next_cursor, groups)
        now = (await self.status(run_id)).open
        self.most_open[run_id] = max(self.most_open.get(run_id, 0), now)
        self.accepted += [(group.example_index, sample) for group in groups for sample in group.samples]
        return tickets

    async def events(self, run_id: str, after: str, limit: int, wait: float) -> list[Event]:
        if self.hidden:
            await asyncio.sleep(0)
            return []
        return await super().events(run_id, after, limit, wait)

    async def status(self, run_id: str = RUN) -> RunStatus:
        status = await self.run(run_id)
        assert status is not None
        return status


class Output:
    """A run's files, as each of its coordinators finds them.

    Args:
        folder: where they are.
        name: the run's id.
        delivers: whether it decides groups and says how far it is, as runs of the head do.
        spec: what differs from the plain run of ``SAMPLES`` samples.
    """

    def __init__(self, folder: Path, *, name: str = RUN, delivers: bool = False, **spec: Any) -> None:
        self.out = folder / f"{name}.jsonl"
        self.name = name
        self._delivers = delivers
        self._changes = spec

    @property
    def run_dir(self) -> Path:
        return self.out.with_suffix(".run")

    def spec(self, priority: int = 0) -> RunSpec:
        limits = Limits(retry_base_delay=0.0, max_attempts=100)
        plain = {"run_id": self.name, "model": "stub:", "samples": SAMPLES, "limits": limits}
        return RunSpec.model_validate({**plain, "priority": priority, **self._changes})

    @asynccontextmanager
    async def coordinator(
        self,
        stack: Stack,
        examples: int | Examples,
        *,
        archive: type[Archive] = Archive,
        window: int | None = 8,
        priority: int = 0,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> AsyncIterator[Coordinator]:
        """Make a coordinator that continues what the files hold."""
        spec = self.spec(priority)
        metrics = Metrics(spec.samples)
        with ExitStack() as files:
            opened = files.enter_context(
                archive(self.out, spec.samples).open(resume=True, on_row=metrics.add)
            )
            groups = Groups(spec, self.run_dir).open(opened) if self._delivers else None
            if groups:
                files.callback(groups.close)
            yield Coordinator(
                ledger=stack.ledger,
                publisher=stack.queues,
                spec=spec,
                source=Examples(examples) if isinstance(examples, int) else examples,
                archive=opened,
                metrics=metrics,
                window=window,
                on_progress=on_progress,
                cancel=partial(cancel_run, stack.ledger, self.name, "the run was cancelled"),
                groups=groups,
                cancel_samples=partial(cancel_samples, stack.ledger, spec),
                progress=ProgressFile(self.run_dir) if self._delivers else None,
            )

    def places(self) -> list[tuple[int, int]]:
        """Return example and sample of each row in both files, sorted."""
        found = []
        for path in (self.out, self.out.with_suffix(".failures.jsonl")):
            rows = map(json.loads, path.read_text().splitlines())
            found += [(row["example_index"], row["sample_index"]) for row in rows]
        return sorted(found)


def everything(examples: int) -> list[tuple[int, int]]:
    return [(index, sample) for index in range(examples) for sample in range(SAMPLES)]


class FlakyLedger:
    """A ledger whose connection breaks at random, before or after the call was done."""

    def __init__(self, ledger: Ledger, chance: random.Random, share: float) -> None:
        self._ledger = ledger
        self._chance = chance
        self._share = share

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._ledger, name)

        async def call(*arguments: Any, **options: Any) -> Any:
            if self._chance.random() < self._share:
                raise LedgerError
            answer = await method(*arguments, **options)
            if self._chance.random() < self._share:
                raise LedgerError
            return answer

        return call
