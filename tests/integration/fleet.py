"""Real Celery workers and beat in processes of their own, on a real Redis, and runs to give them."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gym_queue import assembly
from gym_queue.embedded.children import kill_session, last_words, spawn
from gym_queue.output import RolloutRow
from gym_queue.records import Example, Group, Limits, RunSpec
from gym_queue.settings import Settings
from gym_queue.testing import async_wait_until

if TYPE_CHECKING:
    import signal
    import subprocess
    from collections.abc import Iterable
    from types import TracebackType

    from gym_queue.ledger.base import Event

REPOSITORY = Path(__file__).parents[2]

IMPATIENT = {"WORKER_HEARTBEAT_INTERVAL": 0.5, "WORKER_TIMEOUT": 2, "GYM_QUEUE_SWEEP_INTERVAL": 0.5}
"""A fleet that notices deaths and losses within seconds."""

WORLD = "python:world:World"
WORLD_SOURCE = textwrap.dedent(
    '''
    """An environment that does what its row says, and waits for the file ``gate`` where it is told to."""

    import asyncio
    import os
    import time
    from pathlib import Path

    from gym_queue.environments.base import Environment, Observation
    from gym_queue.records import Verdict

    GATE = Path(__file__).with_name("gate")


    class ToldLate:
        """Signals its process when Python clears the module that holds it."""

        def __init__(self, signals, kill=os.kill, pid=os.getpid()):
            self.signals, self.kill, self.pid = signals, kill, pid
            self.told = Path(__file__).with_name("told").open("w")

        def __del__(self):
            for number in self.signals:
                self.kill(self.pid, number)
            self.told.write("late")
            self.told.close()


    class World(Environment):
        def inline(self, example):
            return not example.row.get("queued")

        async def reset(self, example, session):
            if example.row.get("block"):
                Path(__file__).with_name("blocked").touch()
                while not GATE.exists():
                    time.sleep(0.01)
            if example.row.get("told late"):
                globals()["told_late"] = ToldLate(example.row["told late"])
            if example.row.get("thread"):
                await asyncio.to_thread(time.sleep, 3600)
            try:
                while example.row.get("wait") and not GATE.exists():
                    await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                with Path(__file__).with_name("cancelled").open("a") as file:
                    file.write(example.id)
                raise
            return Observation(messages=({"role": "user", "content": "hello"},))

        def verify(self, example, trajectory):
            match example.row.get("verifier"):
                case "spins":
                    while True:
                        pass
                case "sleeps":
                    time.sleep(3600)
                case "waits":
                    while not GATE.exists():
                        time.sleep(0.02)
                case "exits":
                    os._exit(example.row["status"])
                case "kills":
                    os.kill(os.getpid(), example.row["signal"])
            return Verdict(reward=1.0, metrics={"verified_by": float(os.getpid())})
    '''
)


@dataclass
class Run:
    """A run given to the fleet, and what came back of it so far."""

    spec: RunSpec
    accepted: int
    events: list[Event] = field(default_factory=list)

    def rows(self) -> list[RolloutRow]:
        return [RolloutRow.model_validate_json(event.row) for event in self.events]

    def assert_each_ended_once(self) -> None:
        places = Counter((event.summary.example_index, event.summary.sample_index) for event in self.events)
        assert len(places) == self.accepted
        assert set(places.values()) == {1}

    def most_at_once(self) -> int:
        """Return how many rollouts were between claim and end at the same time, by the ledger's clock."""
        moments = []
        for row in self.rows():
            timings = row.timings
            claimed = timings.accepted_at + (timings.queued or 0.0)
            moments += [(claimed, 1), (timings.ended_at, -1)]
        most = now = 0
        for _, change in sorted(moments):
            now += change
            most = max(most, now)
        return most


class Fleet:
    """Starts Celery processes with the given settings (environment variables) and ends them all."""

    def __init__(self, redis_url: str, folder: Path, **variables: object) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.variables = {
            **os.environ,
            "GYM_QUEUE_REDIS_URL": redis_url,
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(folder), os.environ.get("PYTHONPATH", "")]),
            **{name: str(value) for name, value in variables.items()},
        }
        self.gate = folder / "gate"
        self.blocked = folder / "blocked"
        settings = Settings(redis_url=redis_url)
        self.ledger = assembly.make_ledger(settings)
        self.broker = assembly.make_broker(settings)
        (folder / "world.py").write_text(WORLD_SOURCE)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, process in self.processes.items():
            kill_session(process)
            if error is not None:
                print(f"{name}: {last_words(self._log(name), 12)}")  # noqa: T201 - pytest shows it
        await self.broker.close()
        await self.ledger.close()

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def text(self, name: str) -> str:
        """Return all that a process has said."""
        return self._log(name).read_text()

    def log(self, name: str, *, containing: str = "") -> list[str]:
        """Return the lines of a process's log that contain a text, without Celery's banner."""
        lines = self._log(name).read_text().splitlines()
        return [line for line in lines if containing in line and re.match(r"\d{4}-|Traceback", line)]

    def launch(self, name: str, *arguments: str) -> None:
        """Start ``celery -A`` with the given arguments."""
        argv = [sys.executable, "-m", "celery", "-A", *arguments]
        self.processes[name] = spawn(argv, self._log(name), environment=self.variables, cwd=self.folder)

    async def start(self, *names: str) -> None:
        """Start processes named ``gpu…``, ``cpu…`` or ``beat…`` and wait until the workers hold a lease."""
        for name in names:
            kind = re.sub(r"\d", "", name)
            if kind == "beat":
                arguments = ["beat", "beat", "-s", str(self.folder / "schedule")]
            else:
                arguments = [f"workers.{kind}", "worker", "-n", f"{name}@%h"]
            self.launch(name, *arguments)
        for name in names:
            if not name.startswith("beat"):
                await self.leased(name)

    async def leased(self, name: str) -> None:
        """Wait until a worker holds a lease."""
        await async_wait_until(partial(self.worker, name), 60, what=f"the lease of {name}")

    async def stopped_pulling(self, name: str) -> None:
        """Wait until a worker that was told to end waits for its rollouts only."""
        await async_wait_until(lambda: self.log(name, containing="waiting up to"), what=f"{name} to wait")

    async def worker(self, name: str) -> str:
        """Return what the ledger calls this worker; empty while it holds no lease."""
        pid = str(self.processes[name].pid)
        leases = await self.ledger.leases()
        return next((lease.worker for lease in leases if lease.info.get("pid") == pid), "")

    async def age(self, name: str) -> float:
        """Return how many seconds ago a worker renewed its lease."""
        pid = str(self.processes[name].pid)
        return next(lease.age for lease in await self.ledger.leases() if lease.info.get("pid") == pid)

    async def owned(self, name: str) -> int:
        """Return how many rollouts this worker owns."""
        return len(await self.ledger.owned(await self.worker(name), None, 10_000))

    async def in_flight(self, name: str, count: int) -> None:
        """Wait until a worker owns this many rollouts."""

        async def reached() -> bool:
            return await self.owned(name) == count

        await async_wait_until(reached, 30, what=f"{count} rollouts in flight on {name}")

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a process; ``SIGTERM`` is how an operator asks it to end."""
        os.kill(self.processes[name].pid, number)

    def children(self, name: str) -> set[int]:
        """Return the ids of a prefork worker's children."""
        pid = self.processes[name].pid
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}

    async def exit_status(self, name: str, timeout: float = 30.0) -> int | None:  # noqa: ASYNC109
        """Wait for the end of a process."""
        process = self.processes[name]
        await async_wait_until(lambda: process.poll() is not None, timeout, what=f"the end of {name}")
        return process.returncode

    def peak_memory(self, name: str) -> float:
        """Return the most memory that a process ever held, in MB (VmHWM of proc(5))."""
        status = Path(f"/proc/{self.processes[name].pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found.group(1)) * 1024 / 1e6

    async def submit(
        self, rows: Iterable[dict[str, Any]], *, environment: str = WORLD, samples: int = 1, **spec: Any
    ) -> Run:
        """Open a run over these rows, accept them and publish their tickets."""
        limits = Limits(**{"retry_base_delay": 0.0} | spec.pop("limits", {}))
        run = RunSpec(**{"run_id": "run", "model": "stub:"} | spec, samples=samples, limits=limits)
        groups = [
            Group(
                example_index=index,
                samples=tuple(range(samples)),
                example=Example(id=str(index), environment=environment, row=row),
            )
            for index, row in enumerate(rows)
        ]
        await self.ledger.open_run(run, run.run_id)
        tickets = []
        for start in range(0, len(groups), 256):
            step = groups[start : start + 256]
            tickets += await self.ledger.accept(run.run_id, start, start + len(step), step)
        await self.broker.publish(tickets)
        return Run(run, accepted=len(groups) * samples)

    async def collect(self, run: Run, timeout: float = 30.0) -> Run:  # noqa: ASYNC109
        """Wait until all rollouts of a run have ended, each once."""

        async def complete() -> bool:
            after = run.events[-1].position if run.events else ""
            run.events += await self.ledger.events(run.spec.run_id, after, 1000, 0.0)
            return len(run.events) >= run.accepted

        await async_wait_until(complete, timeout, what=f"{run.accepted} rollouts of {run.spec.run_id} to end")
        status = await self.ledger.run(run.spec.run_id)
        assert status is not None
        assert status.ended == status.accepted == run.accepted
        assert await complete(), "an event came after the last one"
        run.assert_each_ended_once()
        return run


async def command(fleet: Fleet, *arguments: str) -> str:
    """Run ``celery …`` to its end and return what it printed; its exit status must be 0."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "celery", *arguments),
        env=fleet.variables,
        cwd=fleet.folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()
