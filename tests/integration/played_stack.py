"""A stack and a coordinator that are played, for tests of the command around them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import TYPE_CHECKING, Any, ClassVar, Self

from click.testing import CliRunner, Result

from gym_queue import assembly, endings
from gym_queue.cli import execution
from gym_queue.cli.submit import main
from gym_queue.coordinator.run import Progress
from gym_queue.endings import Draft, Place
from gym_queue.ledger.base import Ended, Event
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.records import (
    Failure,
    FailureClass,
    Stage,
    Timings,
    Trajectory,
    Verdict,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    import pytest

    from gym_queue.coordinator.metrics import RunMetrics
    from gym_queue.embedded.stack import Death
    from gym_queue.records import Ticket
    from gym_queue.settings import Settings


class FakeStack:
    """A stack without processes."""

    trouble: ClassVar[Exception | None] = None
    never_ready: ClassVar[bool] = False

    own_redis = True
    pids: ClassVar[set[int]] = set()

    def __init__(
        self, settings: Settings, run_dir: Path, *, workers: int, verifiers: int, fresh: bool
    ) -> None:
        self.settings = settings
        (run_dir / "redis").mkdir(parents=True, exist_ok=True)
        self.asked = (workers, verifiers, fresh)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def wait_ready(self, _ready: Callable[[], Awaitable[set[int]]]) -> None:
        if self.never_ready:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()

    def could_start(self, _pid: int) -> None:
        pass

    async def supervise(self, _died: Callable[[Death], object], _progress: Callable[[], int]) -> None:
        if self.trouble:
            await asyncio.sleep(0)
            raise self.trouble
        await asyncio.Event().wait()


class FakeCoordinator:
    """Ends every rollout that the archive does not hold, as told by the class."""

    failing: ClassVar[set[int]] = set()
    cancelling: ClassVar[set[int]] = set()
    stop_after: ClassVar[int | None] = None
    then: ClassVar[Callable[[FakeCoordinator], Awaitable[None]] | None] = None

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)
        self.parts = parts
        self.interrupted = asyncio.Event()

    def interrupt(self, grace: float) -> None:
        self.interrupted.set()

    async def run(self) -> RunMetrics:
        archive, spec, metrics = self.parts["archive"], self.parts["spec"], self.parts["metrics"]
        ended = 0
        for index, example in enumerate(self.parts["source"].examples(0)):
            for sample in range(spec.samples):
                ordinal = index * spec.samples + sample
                if archive.is_done(ordinal):
                    continue
                if ended == self.stop_after and (then := type(self).then) is not None:
                    await then(self)
                place = Place(spec=spec, example=example, example_index=index, sample_index=sample)
                end = self.end(place, failed=ordinal in self.failing)
                if ordinal in self.cancelling:
                    timings = Timings(accepted_at=1.0, ended_at=3.0)
                    end = endings.cancelled(place, timings, "not wanted")
                [event] = archive.append([Event(position=str(ordinal), summary=end.summary, row=end.row)])
                metrics.add(event.summary)
                ended += 1
                self.parts["on_progress"](
                    Progress(
                        total=0, succeeded=archive.count, failed=0, cancelled=0, in_flight=1, reward_mean=0.5
                    )
                )
        return metrics.snapshot(accepted=archive.count)  # type: ignore[no-any-return]

    @staticmethod
    def end(place: Place, *, failed: bool) -> Ended:
        timings = Timings(accepted_at=1.0, ended_at=3.0, queued=0.5, generate=1.0)
        if failed:
            failure = Failure(
                failure_class=FailureClass.VERIFIER, stage=Stage.VERIFY, error="no idea\nat all"
            )
            return endings.failed(place, failure, 1, timings)
        trajectory = Trajectory(messages=({"role": "assistant", "content": "4"},), finish_reason="stop")
        draft = Draft(attempt=1, trajectory=trajectory, queued=0.5, generate=1.0)
        return endings.succeeded(place, draft, Verdict(reward=float(place.sample_index % 2)), timings)


class FakePublisher:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tickets: list[Ticket] = []

    async def publish(self, tickets: Sequence[Ticket]) -> None:
        self.tickets.extend(tickets)

    async def close(self) -> None:
        pass


def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Play the stack and the coordinator; stand in the folder of the input."""
    monkeypatch.chdir(tmp_path)
    for name in ("GYM_QUEUE_REDIS_URL", "HEAD_SERVER_URL", "LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(execution, "EmbeddedStack", FakeStack)
    monkeypatch.setattr(execution, "Coordinator", FakeCoordinator)
    monkeypatch.setattr(execution, "configure", lambda *_, **__: None)
    monkeypatch.setattr(assembly, "make_ledger", lambda _: MemoryLedger())
    monkeypatch.setattr(assembly, "make_broker", lambda _: FakePublisher())
    for owner, values in (
        (FakeStack, {"trouble": None, "never_ready": False}),
        (
            FakeCoordinator,
            {"failing": set(), "cancelling": set(), "stop_after": None, "then": None},
        ),
    ):
        for name, value in values.items():
            monkeypatch.setattr(owner, name, value)
    rows = [{"prompt": f"{number} + 1?", "answer": str(number + 1), "colour": "red"} for number in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def submit(*arguments: str) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(
        main, ["in.jsonl", "--model", "stub:", "--samples", "2", "-o", "out.jsonl", *arguments]
    )


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
