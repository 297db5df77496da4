"""Redis, workers and beat on this machine, for one command: started, watched, restarted, and gone with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self

from gym_queue.assembly import make_payloads
from gym_queue.embedded.children import kill_session, last_words, spawn
from gym_queue.embedded.redis import RedisServer
from gym_queue.errors import StackError
from gym_queue.settings import environment

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Awaitable, Callable, Iterable, Mapping
    from pathlib import Path
    from types import TracebackType

    from gym_queue.settings import Settings

_log = logging.getLogger(__name__)

_WATCH_INTERVAL = 0.1
_LONG_LIFE = 10.0
"""Seconds. Of a part without a lease, one that lives longer than this can start."""

_CHANCES_BEFORE_READY = 3
"""Nothing is fed before the workers are ready, so a part that keeps dying by then is broken itself."""

_CHANCES_TO_START = 10
"""Starts in a row that a part may fail at while the run makes no progress."""

_CHANCES = 50
"""Deaths in a row that a part may die while the run makes no progress. So many, because rollouts that kill
their workers are told from the others by elimination, and until that is done nothing else may end.
"""

_FIRST_BACKOFF = 0.5
_LONGEST_BACKOFF = 30.0
_WITHOUT_LEASE = frozenset({"redis", "beat"})

_TIME_FOR_SERVICES = 8.0
"""Seconds that services have to end what they are answering, before the workers are told to end."""


class Part(Protocol):
    """A process of the stack."""

    log: Path
    process: subprocess.Popen[bytes] | None

    def spawn(self) -> None:
        """Start it, again if it ended."""


class CommandPart:
    """A Celery worker, beat, or a service."""

    def __init__(self, argv: list[str], log: Path, variables: Mapping[str, str]) -> None:
        self.argv = argv
        self.log = log
        self.variables = variables
        self.process: subprocess.Popen[bytes] | None = None

    def spawn(self) -> None:
        """Start it. Settings travel as environment variables: everybody can read a process's arguments."""
        variables = {**os.environ, "PYTHONFAULTHANDLER": "1", **self.variables}
        self.process = spawn(self.argv, self.log, environment=variables)


@dataclass(frozen=True)
class Death:
    """A process that died. ``words`` go on where a sentence names it: how it ended, and what it said last."""

    pid: int
    words: str


@dataclass
class _Record:
    """How a part has done so far. ``due`` is when to start it again; ``None`` while it runs.

    What it says in its log begins at byte ``log_start``. ``early`` counts deaths in a row before it had
    started, ``vain`` those without progress of the run since the one before; ``progress`` is how far the run
    was at the last.
    """

    started: float = field(default_factory=time.monotonic)
    log_start: int = 0
    early: int = 0
    vain: int = 0
    progress: int = 0
    due: float | None = None


def celery_commands(workers: int, verifiers: int, suffix: str = "") -> dict[str, list[str]]:
    """Return the command of each Celery process by the name of its part (and of its log)."""
    celery = [sys.executable, "-m", "celery", "--quiet", "-A"]
    commands = {
        f"gpu{number}": [*celery, "workers.gpu", "worker", "-n", f"gpu{number}{suffix}@%h"]
        for number in range(1, workers + 1)
    }
    if verifiers:
        node = f"cpu{suffix}@%h"
        commands["cpu"] = [*celery, "workers.cpu", "worker", "-n", node, "--concurrency", str(verifiers)]
    if commands:  # a fleet that has all the workers has its own
        commands["beat"] = [*celery, "beat", "beat"]
    return commands


class EmbeddedStack:
    """Everything that one run needs on this machine.

    Enter it on the main thread: the processes die with the thread that did (``children.spawn`` says why).
    With no ``workers`` and no ``verifiers`` it has no process but that of Redis: others do the work.
    ``redis_url`` is left alone where the user set it; otherwise a Redis of our own starts in
    ``run_dir/redis``, with what an earlier command left there, or without if ``fresh``, and what is too large
    for it lies in ``run_dir/payloads``. After entering, ``settings`` carry the URLs to use. ``wait_ready``
    before the work, and keep ``supervise`` running beside both. ``services`` are further commands by the
    names of their parts; they are told to end first.
    """

    def __init__(
        self,
        settings: Settings,
        run_dir: Path,
        *,
        workers: int,
        verifiers: int,
        fresh: bool = True,
        services: Mapping[str, list[str]] | None = None,
    ) -> None:
        self.settings = settings
        self.run_dir = run_dir.absolute()
        self.workers = workers
        self.verifiers = verifiers
        self.fresh = fresh
        self.services = dict(services or {})
        self.parts: dict[str, Part] = {}
        self._records: dict[str, _Record] = {}
        self._redis: RedisServer | None = None
        self._suffix = ""
        self._ready = False

    @property
    def own_redis(self) -> bool:
        """Whether nobody else can be using the Redis."""
        return self._redis is not None

    @property
    def pids(self) -> set[int]:
        """Ids of the processes that were started last, alive or not."""
        return {part.process.pid for part in self.parts.values() if part.process}

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.stop(grace=0.0)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop(grace=self.settings.shutdown_grace if error is None else 0.0)

    async def _start(self) -> None:
        logs = self.run_dir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        if "redis_url" in self.settings.model_fields_set:
            from gym_queue.embedded.preflight import await_redis  # noqa: PLC0415 - redis-py loads slowly

            await await_redis(self.settings.redis_url)
            self._suffix = (
                f"-{os.getpid()}"  # others may share that Redis; two workers of one name confuse it
            )
        else:
            self._redis = RedisServer(self.run_dir / "redis", logs / "redis.log", fresh=self.fresh)
            self._add("redis", self._redis)
            await asyncio.to_thread(self._redis.wait_ready)
            self.settings = self.settings.model_copy(update={"redis_url": self._redis.url})
        await asyncio.to_thread(self._keep_payloads)
        variables = environment(self.settings)
        commands = self.services | celery_commands(self.workers, self.verifiers, self._suffix)
        for name, argv in commands.items():
            self._add(name, CommandPart(argv, logs / f"{name}.log", variables))

    def _keep_payloads(self) -> None:
        """Keep beside our own Redis what is too large for it, unless the user said where; see that it can be.

        Raises:
            UsageError: it cannot.
        """
        if self.own_redis:
            folder = self.run_dir / "payloads"
            if self.fresh:
                shutil.rmtree(folder, ignore_errors=True)
            if "payload_url" not in self.settings.model_fields_set:
                self.settings = self.settings.model_copy(update={"payload_url": str(folder)})
        payloads = make_payloads(self.settings)
        if payloads is not None:
            payloads.check()

    def _add(self, name: str, part: Part) -> None:
        self.parts[name] = part
        self._records[name] = record = _Record()
        self._spawn(part, record)

    @staticmethod
    def _spawn(part: Part, record: _Record) -> None:
        record.log_start = part.log.stat().st_size if part.log.exists() else 0
        part.spawn()
        record.started, record.due = time.monotonic(), None

    async def wait_ready(
        self,
        ready: Callable[[], Awaitable[set[int]]],
        timeout: float = 120.0,  # noqa: ASYNC109 - the error has to say whom it waited for
    ) -> None:
        """Wait until ``ready()``, the ids of this machine's processes that hold a lease, has all workers.

        Raises:
            StackError: some were missing after ``timeout`` seconds. (``supervise`` tells of the dead.)
        """
        deadline = time.monotonic() + timeout
        while missing := self._without_lease(await ready()):
            if time.monotonic() > deadline:
                name = missing[0]
                words = last_words(self.parts[name].log)
                msg = f"worker {name} was not ready in {timeout:g} s; its last words: {words}"
                raise StackError(msg)
            await asyncio.sleep(_WATCH_INTERVAL)
        self._ready = True

    def _without_lease(self, pids: set[int]) -> list[str]:
        return [
            name
            for name, part in self.parts.items()
            if self._has_lease(name) and (part.process is None or part.process.pid not in pids)
        ]

    def _has_lease(self, name: str) -> bool:
        return name not in _WITHOUT_LEASE and name not in self.services

    async def supervise(
        self, died: Callable[[Death], object] = lambda _: None, progress: Callable[[], int] = lambda: 0
    ) -> None:
        """Start what died again, until cancelled; what cannot start, each time a little later.

        A rollout may kill its worker, and many may do so many times: that takes no part down for good, as
        long as others end in between.

        Args:
            died: is told each death, so that the work can be given back at once: nobody else knows of it
                before a lease has run out.
            progress: a number that grows with the run.

        Raises:
            StackError: a part keeps dying in vain; the sentence has its last words.
        """
        for record in self._records.values():
            record.progress = progress()
        while True:
            for name, part in self.parts.items():
                death = self._look_after(name, part, self._records[name], progress)
                if death is not None:
                    died(death)
            await asyncio.sleep(_WATCH_INTERVAL)

    def could_start(self, pid: int) -> None:
        """Take note that a process which died had been ready for work: it may start again soon."""
        for name, part in self.parts.items():
            record = self._records[name]
            if part.process is not None and part.process.pid == pid and record.due is not None:
                record.early = 0
                record.due = min(record.due, time.monotonic() + _FIRST_BACKOFF)

    def _look_after(
        self, name: str, part: Part, record: _Record, progress: Callable[[], int]
    ) -> Death | None:
        """Start a part that is due, or note one that died."""
        now = time.monotonic()
        if record.due is not None:
            if now >= record.due:
                self._spawn(part, record)
            return None
        process = part.process
        status = process.poll() if process else None
        if process is None or status is None:
            return None
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        words = f"its last words ({part.log}): {last_words(part.log, since=record.log_start)}"
        record.vain = 1 if progress() > record.progress else record.vain + 1
        record.progress = progress()
        started = not self._has_lease(name) and now - record.started >= _LONG_LIFE
        record.early = 0 if started else record.early + 1
        if record.vain >= _CHANCES or min(record.vain, record.early) >= (
            _CHANCES_TO_START if self._ready else _CHANCES_BEFORE_READY
        ):
            msg = f"{name} {how}, {record.vain} times in a row with no progress in between; {words}"
            raise StackError(msg)
        delay = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2.0 ** (max(1, record.early) - 1))
        record.due = now + delay
        _log.warning("%s %s; it starts again in %g s (log: %s)", name, how, delay, part.log)
        return Death(process.pid, f"{how}; {words}")

    async def stop(self, grace: float) -> None:
        """End all parts: TERM, up to ``grace`` seconds for workers to finish, KILL. Services go first, and
        Redis last.
        """
        first = self._processes(self.services)
        celery = self._processes(self.parts.keys() - self.services.keys() - {"redis"})
        try:
            await _end(first, min(grace, _TIME_FOR_SERVICES))
            await _end(celery, grace)
        finally:
            for process in first + celery:
                kill_session(process)
            if self._redis is not None:
                await asyncio.to_thread(self._redis.stop)
            self.parts.clear()

    def _processes(self, names: Iterable[str]) -> list[subprocess.Popen[bytes]]:
        found = [self.parts[name].process for name in names if name in self.parts]
        return [process for process in found if process is not None]


async def _end(processes: list[subprocess.Popen[bytes]], grace: float) -> None:
    """Tell them to end, and wait up to ``grace`` seconds until they have."""
    for process in processes:
        process.terminate()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(grace):
            await _all_ended(processes)


async def _all_ended(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        while process.poll() is None:  # noqa: ASYNC110 - the kernel tells nobody but who asks
            await asyncio.sleep(_WATCH_INTERVAL / 2)
