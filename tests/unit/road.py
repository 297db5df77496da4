"""What tests of the road share: a run in a ledger in memory, a publisher that remembers, worlds to act in."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gym_queue.engines.stub import StubEngine, StubOptions
from gym_queue.environments.base import Environment, Observation
from gym_queue.errors import BrokerError
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.pipeline import Pipeline
from gym_queue.records import Example, Group, Limits, Message, RunSpec, Stage, Ticket, Verdict

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from gym_queue.engines.base import Completion
    from gym_queue.engines.base import Engine as AnyEngine
    from gym_queue.ledger.base import Event, Ledger
    from gym_queue.records import Trajectory
    from gym_queue.telemetry.story import Observer

RUN = "run-1"


class RecordingPublisher:
    """Keeps what would go to the broker, unless it is ``away``."""

    def __init__(self) -> None:
        self.tickets: list[Ticket] = []
        self.away = False

    async def publish(self, tickets: Sequence[Ticket]) -> None:
        if self.away:
            raise BrokerError
        self.tickets += tickets

    def take(self) -> list[Ticket]:
        taken, self.tickets = self.tickets, []
        return taken


class World(Environment):
    """One turn; says and verifies what it is told to."""

    def __init__(self, *, inline: bool = True, verify: Callable[[], Any] | None = None) -> None:
        self._inline = inline
        self._verify = verify or (lambda: Verdict(reward=1.0, metrics={"length": 2.0}))

    def inline(self, example: Example) -> bool:
        return self._inline

    def reset(self, example: Example, session: dict[str, Any]) -> Observation:
        return Observation(messages=({"role": "user", "content": example.row["prompt"]},))

    def verify(self, example: Example, trajectory: Trajectory) -> Verdict | Awaitable[Verdict]:
        verdict: Verdict = self._verify()
        return verdict


def run_spec(**changes: Any) -> RunSpec:
    fields = {"run_id": RUN, "model": "stub:", "samples": 2, "limits": Limits(retry_base_delay=0.0)}
    return RunSpec.model_validate(fields | changes)


def group(index: int, samples: Sequence[int] = (0, 1), **extra: Any) -> Group:
    example = Example(id=f"e{index}", environment="world", row={"prompt": f"{index}?"}, extra=extra)
    return Group(example_index=index, samples=tuple(samples), example=example)


class Engine(StubEngine):
    """Says "ok" after what ``act`` does: raises, waits."""

    def __init__(self, act: Callable[[], Awaitable[None]] | None = None) -> None:
        super().__init__(StubOptions())
        self.act = act
        self.calls = 0

    async def generate(self, messages: Sequence[Message], **options: Any) -> Completion:
        self.calls += 1
        if self.act:
            await self.act()
        return await super().generate(messages, **options)


def raising(error: BaseException) -> Callable[[], Any]:
    def act() -> Any:
        raise error

    return act


def failing_engine(error: BaseException) -> Engine:
    async def act() -> None:
        raise error

    return Engine(act)


class Gate:
    """Holds rollouts until it is opened, and counts those that wait."""

    def __init__(self) -> None:
        self.waiting = 0
        self._open = asyncio.Event()

    async def __call__(self) -> None:
        self.waiting += 1
        await self._open.wait()

    def open(self) -> None:
        self._open.set()


@dataclass
class Road:
    """One run, one worker. Change ``engine`` and ``world`` before work begins."""

    world: Environment = field(default_factory=World)
    engine: AnyEngine = field(default_factory=Engine)
    ledger: Ledger = field(default_factory=MemoryLedger)
    publisher: RecordingPublisher = field(default_factory=RecordingPublisher)
    worker: str = "gpu"
    slots: int | None = None
    observers: Sequence[Observer] = ()

    def __post_init__(self) -> None:
        async def engine(_: str) -> AnyEngine:
            return self.engine

        self.pipeline = Pipeline(
            self.ledger,
            self.publisher,
            engine,
            lambda _: self.world,
            worker=self.worker,
            slots=self.slots,
            observers=self.observers,
        )

    async def submit(self, *groups: Group, **changes: Any) -> list[Ticket]:
        await self.ledger.open_run(run_spec(**changes), RUN)
        return await self.ledger.accept(RUN, 0, len(groups), groups)

    async def work(self, *tickets: Ticket) -> None:
        """Work off these tickets, and those that follow from them."""
        todo = list(tickets)
        while todo:
            ticket = todo.pop(0)
            serve = self.pipeline.generate if ticket.stage is Stage.GENERATE else self.pipeline.verify
            await serve(ticket)
            todo += self.publisher.take()

    async def events(self) -> list[Event]:
        return await self.ledger.events(RUN, "", 1000, 0)

    async def rows(self) -> list[dict[str, Any]]:
        return [json.loads(event.row) for event in await self.events()]
