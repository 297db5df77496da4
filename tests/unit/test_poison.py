"""Rollouts that kill their workers end as failed, in bounded time, and nobody else does (G6).

A fleet in one event loop. A worker that dies says nothing more to anybody: whatever it asks of its ledger is
never answered.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.ledger.memory import MemoryLedger
from gym_queue.maintenance.audit import audit
from gym_queue.maintenance.reap import bury
from gym_queue.pipeline import Pipeline
from gym_queue.records import Limits, Stage
from gym_queue.testing import async_wait_until
from tests.unit.road import RUN, Engine, RecordingPublisher, World, group, run_spec

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from gym_queue.engines.base import Completion
    from gym_queue.records import Message, Ticket

SLOTS, WORKERS = 16, 3
NAMES = iter(range(1_000_000))


class Worker:
    """Takes tickets while it has room, until it dies."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.name = f"worker-{next(NAMES)}"
        self.dead = False
        self.used = 0
        self.running: set[asyncio.Task[None]] = set()
        world = World()
        self.pipeline = Pipeline(
            Silenced(fleet.ledger, self),  # type: ignore[arg-type]
            fleet.publisher,
            self.engine,
            lambda _: world,
            worker=self.name,
            slots=SLOTS,
        )

    async def engine(self, _: str) -> Mortal:
        return Mortal(self)

    def fill(self) -> None:
        while self.fleet.queue and self.used < SLOTS:
            ticket = self.fleet.queue.popleft()
            self.used += len(ticket.samples)
            task = asyncio.create_task(self.serve(ticket))
            self.running.add(task)

    async def serve(self, ticket: Ticket) -> None:
        await self.pipeline.generate(ticket)
        self.used -= len(ticket.samples)

    async def die(self) -> None:
        self.dead = True
        await asyncio.Event().wait()


class Silenced:
    """A worker's way to the ledger, which ends with it."""

    def __init__(self, ledger: MemoryLedger, worker: Worker) -> None:
        self._ledger = ledger
        self._worker = worker

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def ask(*arguments: Any) -> Any:
            if self._worker.dead:
                await asyncio.Event().wait()
            return await getattr(self._ledger, name)(*arguments)

        return ask


class Mortal(Engine):
    """Dies of poison; needs a few steps for all else."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self.worker = worker

    async def generate(self, messages: Sequence[Message], **options: Any) -> Completion:
        for _ in range(5):
            await asyncio.sleep(0)
        prompt = str(messages[0]["content"])
        if int(prompt.rstrip("?")) in self.worker.fleet.poison:
            self.worker.fleet.killed[prompt] += 1
            await self.worker.die()
        return await super().generate(messages, **options)


class Fleet:
    def __init__(self, poison: set[int]) -> None:
        self.poison = poison
        self.ledger = MemoryLedger()
        self.publisher = RecordingPublisher()
        self.queue: deque[Ticket] = deque()
        self.killed: Counter[str] = Counter()
        self.workers = [Worker(self) for _ in range(WORKERS)]
        self.deaths = 0

    async def depth(self, stage: Stage) -> int:
        return len(self.queue) if stage is Stage.GENERATE else 0

    async def step(self) -> None:
        """Replace the dead, let the others pull, publish what is missing."""
        self.queue += self.publisher.take()
        for place, worker in enumerate(self.workers):
            if worker.dead:
                await bury(self.ledger, self.publisher, worker.name, f"{worker.name} died")
                self.workers[place] = Worker(self)
                self.deaths += 1
                for task in worker.running:
                    task.cancel()
            self.workers[place].fill()
        await audit(self.ledger, self, self.publisher, 0.0)
        await asyncio.sleep(0)

    async def run(self, rollouts: int) -> list[str]:
        """Return the state of each rollout's end, by example."""
        spec = run_spec(samples=1, limits=Limits(max_attempts=3))
        await self.ledger.open_run(spec, RUN)
        self.queue += await self.ledger.accept(RUN, 0, rollouts, [group(i, [0]) for i in range(rollouts)])

        async def ended() -> bool:
            await self.step()
            return len(await self.ledger.events(RUN, "", rollouts + 1, 0)) == rollouts

        await async_wait_until(ended, timeout=60.0)
        events = await self.ledger.events(RUN, "", rollouts + 1, 0)
        summaries = sorted((event.summary for event in events), key=lambda summary: summary.example_index)
        assert [summary.example_index for summary in summaries] == list(range(rollouts))
        return [f"{summary.state} {summary.failure_class or ''}".strip() for summary in summaries]


@pytest.mark.guarantee("G6")
@pytest.mark.parametrize("poison", [set(), {7}, {0, 1, 2, 3}, {3, 17, 33, 34, 58, 99}], ids=str)
async def test_g6_only_poison_is_failed(poison: set[int]) -> None:
    rollouts = 100
    fleet = Fleet(poison)
    ends = await fleet.run(rollouts)
    assert ends == ["failed infrastructure" if i in poison else "succeeded" for i in range(rollouts)]
    assert all(deaths <= 4 for deaths in fleet.killed.values())  # max_attempts, and once alone
    assert max(fleet.killed.values(), default=0) <= fleet.deaths <= 4 * len(poison)
