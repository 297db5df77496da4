"""The real stack: Redis, workers, beat and ``submit-rollouts``, each started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gym_queue import assembly
from gym_queue.errors import GymQueueError, LedgerError
from gym_queue.settings import Settings
from gym_queue.testing import async_wait_until
from tests.chaos.network import Cable
from tests.chaos.processes import Processes
from tests.chaos.server import Server
from tests.chaos.world import PART

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gym_queue.ledger.base import Ledger
    from gym_queue.records import RunStatus
    from tests.chaos.faults import Fault
    from tests.chaos.processes import Part
    from tests.chaos.workload import Workload

REPOSITORY = Path(__file__).parents[2]
COORDINATOR = "coordinator"
IMPATIENT = {
    "WORKER_HEARTBEAT_INTERVAL": 1,
    "WORKER_TIMEOUT": 3,
    "GYM_QUEUE_SWEEP_INTERVAL": 1,
    "GYM_QUEUE_SHUTDOWN_GRACE": 1,
    "GYM_QUEUE_TOOL_TIMEOUT": 3,
    "GYM_QUEUE_GENERATE_TIMEOUT": 30,
    "GYM_QUEUE_VERIFY_TIMEOUT": 2,
    "GYM_QUEUE_CONCURRENCY": 16,
    "LOG_LEVEL": "INFO",
}
"""Settings of a fleet that notices deaths, losses and hangs within seconds."""

_LOOK_INTERVAL = 0.1


class Stack:
    """Enter it to have Redis, ``gpu`` workers named gpu1, gpu2, … and so on, ready; leave it to have none.

    Args:
        folder: everything that the stack writes goes here; must not exist.
        remote: names of workers that reach Redis over a cable that can be cut.
        settings: environment variables over ``IMPATIENT``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        gpu: int = 4,
        cpu: int = 1,
        remote: Sequence[str] = (),
        settings: Mapping[str, object] | None = None,
    ) -> None:
        folder.mkdir()
        self.folder = folder
        self.out = folder / "out.jsonl"
        self.redis_lock = asyncio.Lock()
        self.status: RunStatus | None = None
        self.struck: list[Fault] = []
        self._log = (folder / "driver.log").open("a", buffering=1)
        self._names = [f"gpu{number + 1}" for number in range(gpu)]
        self._names += [f"cpu{number + 1}" for number in range(cpu)]
        self._remote = remote
        self._cleanup = contextlib.AsyncExitStack()
        shutil.copy(Path(__file__).with_name("world.py"), folder)
        variables = {name: str(value) for name, value in {**IMPATIENT, **(settings or {})}.items()}
        variables["PYTHONPATH"] = f"{REPOSITORY}:{folder}"
        self.processes = Processes(folder, variables, self.say)
        self.cable = Cable()

    def say(self, line: str) -> None:
        """Write a line into the driver's log."""
        self._log.write(f"{self.processes.now:7.2f}  {line}\n")

    def part(self, name: str) -> Part:
        """Return a process by its name."""
        return self.processes.parts[name]

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as cleanup:
            cleanup.callback(self._log.close)
            if self._remote:
                cleanup.enter_context(self.cable)
            cleanup.callback(self.processes.kill_all)
            await self._start(cleanup)
            self._cleanup = cleanup.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._cleanup.aclose()

    async def _start(self, cleanup: contextlib.AsyncExitStack) -> None:
        self.server = Server(self.processes, [self.cable.address] if self._remote else [])
        cleanup.push_async_callback(self.server.client.aclose)
        for helper in (self.processes.supervise(), self.server.watch(), self._follow()):
            task = asyncio.create_task(helper)
            cleanup.push_async_callback(cancelled, task)
        await self.server.ready()
        self.ledger: Ledger = assembly.make_ledger(Settings(redis_url=self.server.url()))
        cleanup.push_async_callback(self.ledger.close)
        for name in self._names:
            self.start_worker(name)
        self.processes.add("beat", [*self._celery, "beat", "beat", "-s", "schedule"], self._at_home)
        await async_wait_until(self.leased, 60, what="the leases of all workers")

    @property
    def _celery(self) -> list[str]:
        return [sys.executable, "-m", "celery", "-A"]

    @property
    def _at_home(self) -> dict[str, str]:
        return {"GYM_QUEUE_REDIS_URL": self.server.url()}

    def start_worker(self, name: str) -> None:
        """Start a worker named ``gpu…`` or ``cpu…``."""
        argv = [*self._celery, f"workers.{name[:3]}", "worker", "-n", f"{name}@%h"]
        variables = {**self._at_home, PART: name}
        if name in self._remote:
            argv = [*self.cable.prefix(), *argv]
            variables["GYM_QUEUE_REDIS_URL"] = self.server.url(self.cable.address)
        self.processes.add(name, argv + (["-c", "2"] if name.startswith("cpu") else []), variables)

    def submit(self, workload: Workload) -> None:
        """Start ``submit-rollouts``; with ``--resume`` when it died, until it has done everything."""
        workload.write(self.folder / "in.jsonl")
        argv = [sys.executable, "-m", "gym_queue.cli.submit", "in.jsonl", "-o", self.out.name]
        argv += [
            "--environment",
            "python:world:World",
            "--model",
            "stub:",
            "--samples",
            str(workload.samples),
        ]
        part = self.processes.add(COORDINATOR, [*argv, "--workers", "0", "--verifiers", "0"], self._at_home)
        part.again = ["--resume"]
        part.finished = lambda status: status in (0, 1) and self.metrics().get("complete") is True

    def metrics(self) -> dict[str, Any]:
        """Return what the metrics file says; nothing if there is none."""
        path = self.out.with_suffix(".metrics.json")
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    @property
    def run_id(self) -> str:
        """The run's id, from its manifest; empty before there is one."""
        path = self.out.with_suffix(".run") / "manifest.json"
        return str(json.loads(path.read_text())["spec"]["run_id"]) if path.exists() else ""

    def logs(self) -> dict[str, str]:
        """Return what the processes said, by their names."""
        return {name: part.log.read_text() for name, part in self.processes.parts.items()}

    async def _follow(self) -> None:
        """Keep the newest status of the run, which the ledger forgets at its end. Ends by being cancelled."""
        while True:
            with contextlib.suppress(GymQueueError):
                if (run_id := self.run_id) and (status := await self.ledger.run(run_id)):
                    self.status = status
            await asyncio.sleep(_LOOK_INTERVAL)

    @property
    def workers(self) -> list[Part]:
        """The workers' processes."""
        return [part for name, part in self.processes.parts.items() if name[:3] in ("gpu", "cpu")]

    async def worker(self, name: str) -> str:
        """Return what the ledger calls a worker; empty while it has no lease."""
        pid = str(self.part(name).pid)
        return next(
            (lease.worker for lease in await self.ledger.leases() if lease.info.get("pid") == pid), ""
        )

    async def owns(self, name: str, attempts: int) -> bool:
        """Return whether a worker owns so many attempts: no more, no fewer."""
        return len(await self.ledger.owned(await self.worker(name), None, 100_000)) == attempts

    async def clock(self) -> float:
        """Return the time on the ledger's clock."""
        seconds, microseconds = await self.server.client.time()
        return float(seconds + microseconds / 1e6)

    def open_gate(self, gate: str, only: str = "") -> None:
        """Let the rollouts go on that wait for this gate: in all workers, or in one."""
        (self.folder / gate).with_suffix(f".{only}" if only else "").touch()

    async def leased(self, *, no_others: bool = False) -> bool:
        """Return whether all workers run and have a lease (and, if so asked, nobody else has one)."""
        try:
            pids = {lease.info.get("pid") for lease in await self.ledger.leases()}
        except LedgerError:
            return False
        ours = {str(part.pid) for part in self.workers}
        return pids == ours if no_others else pids >= ours


async def cancelled(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end; raises what it raised before."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
