"""Runs in a real ledger, at any moment of their lives, and the command that is asked about them."""

from __future__ import annotations

import asyncio
import platform
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

import redis
from click.testing import CliRunner, Result

from gym_queue import assembly, endings, names
from gym_queue.cli.main import main
from gym_queue.coordinator import manifest
from gym_queue.coordinator.archive import Archive, paths
from gym_queue.coordinator.manifest import Manifest
from gym_queue.endings import Draft, Place
from gym_queue.records import (
    Example,
    Failure,
    FailureClass,
    Group,
    RunSpec,
    Stage,
    Timings,
    Trajectory,
    Verdict,
)
from gym_queue.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import pytest

    from gym_queue.ledger.base import Claim, Ended
    from gym_queue.records import Fence, RunState, Ticket

RUN = "run-1"
LEASE = 660.0
EXAMPLES, SAMPLES = 9, 2


async def gym_queue(*arguments: str | Path) -> Result:
    """Run the command as its users do, beside the test's event loop."""
    return await asyncio.to_thread(CliRunner().invoke, main, list(map(str, arguments)))


async def answer(*arguments: str | Path) -> str:
    """Return what the command prints when it succeeds, with ``_`` for times that pass while a test runs."""
    result = await gym_queue(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert result.stderr == ""
    return re.sub(
        r"\b(for|in|was|waits) \d[\d.]* (?:s|min|h|d)(?: \d+ (?:s|min|h))?\b", r"\1 _", result.stdout
    )


async def refusal(*arguments: str | Path) -> str:
    """Return the one sentence with which the command refuses."""
    result = await gym_queue(*arguments)
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("gym-queue: ")
    return line.removeprefix("gym-queue: ")


class Scene:
    """One Redis with a run of ``EXAMPLES`` examples, whose output is far away unless it is ``local``."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.out = folder / "out.jsonl"
        self.settings = Settings(redis_url=url)
        self.ledger = assembly.make_ledger(self.settings)
        self.spec = RunSpec(run_id=RUN, model="stub:", samples=SAMPLES, output="far-away:/runs/out.jsonl")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.ledger.close()

    def local(self) -> None:
        """Say that the run's output is on this machine, and write down what it was submitted with."""
        self.spec = self.spec.model_copy(update={"output": f"{platform.node()}:{self.out}"})
        self.write_manifest()

    def write_manifest(self, command: tuple[str, ...] = (), directory: str = "") -> None:
        found = Manifest(spec=self.spec, examples=EXAMPLES, command=command, directory=directory)
        manifest.write(paths(self.out).run_dir, found)

    async def accept(self, *indices: int, **spec: Any) -> list[Ticket]:
        """Open the run and accept examples, in one step each; the first one accepts all before it too."""
        if spec:
            self.spec = RunSpec.model_validate(self.spec.model_dump() | spec)
        await self.ledger.open_run(self.spec, self.spec.run_id)
        tickets = []
        for index in indices:
            status = await self.ledger.run(self.spec.run_id)
            assert status is not None
            group = Group(example_index=index, samples=tuple(range(SAMPLES)), example=_example(index))
            tickets += await self.ledger.accept(self.spec.run_id, status.cursor, index + 1, [group])
        assert len(tickets) == len(indices)
        return tickets

    async def claim(self, ticket: Ticket, worker: str = "gpu-a", used: int = 4) -> Claim:
        """Let a worker with four slots take a ticket."""
        await self.beat(worker, used)
        claim = await self.ledger.claim(ticket, worker, LEASE)
        assert claim is not None
        return claim

    async def beat(self, worker: str, used: int = 4) -> None:
        kind = worker.partition("-")[0]
        info = {"kind": kind, "node": "node-1", "slots": "4", "used": str(used)}
        await self.ledger.heartbeat(worker, info)

    def silence(self, worker: str, seconds: float) -> None:
        """Let a worker's last heartbeat be so long ago."""
        with redis.Redis.from_url(self.url) as client:
            client.zincrby(names.leases_key(), -seconds, worker)

    async def end(self, fence: Fence, failure_class: FailureClass | None = None) -> Ended:
        """End a claimed rollout: it succeeded, or failed by this class."""
        ended = self.ended(fence.example_index, fence.sample_index, failure_class)
        assert (await self.ledger.commit(fence, ended)).accepted
        return ended

    def ended(
        self, example_index: int, sample_index: int, failure_class: FailureClass | None = None
    ) -> Ended:
        place = Place(
            spec=self.spec,
            example=_example(example_index),
            example_index=example_index,
            sample_index=sample_index,
        )
        timings = Timings(accepted_at=100.0, ended_at=142.0, queued=1.0, generate=40.0)
        if failure_class:
            failure = Failure(
                failure_class=failure_class, stage=Stage.GENERATE, error=f"error {example_index}"
            )
            return endings.failed(place, failure, 3, timings)
        trajectory = Trajectory(
            messages=({"role": "assistant", "content": f'"rollout_id":"{RUN}.0.0"'},), finish_reason="stop"
        )
        draft = Draft(attempt=1, trajectory=trajectory, queued=1.0, generate=40.0)
        return endings.succeeded(place, draft, Verdict(reward=0.5), timings)

    async def state(self) -> RunState:
        """Return the state of the run."""
        status = await self.ledger.run(self.spec.run_id)
        assert status is not None
        return status.state

    async def archive(self) -> None:
        """Write what has ended to the files, as the coordinator would, and acknowledge it."""
        events = await self.ledger.events(self.spec.run_id, "", 1000, 0.0)
        with Archive(self.out, SAMPLES).open(resume=True) as archive:
            archive.append(events)
        await self.ledger.acknowledge(self.spec.run_id, events[-1].position)


@asynccontextmanager
async def staged(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    """Stand in a folder, with a ledger that the command is told of."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GYM_QUEUE_REDIS_URL", url)
    async with Scene(url, folder) as scene:
        yield scene


def _example(index: int) -> Example:
    return Example(id=f"e{index}", environment="rows", row={}, extra={"of": {"rollout_id": f"{RUN}.0.0"}})
