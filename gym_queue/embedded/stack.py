"""Redis, workers and beat on this machine, for one command: started, watched, restarted, and gone with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self

from gym_queue.embedded.children import kill_session, last_words, spawn
from gym_queue.embedded.redis import RedisServer
from gym_queue.errors import StackError
from gym_queue.settings import environment

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path
    from types import TracebackType

    from gym_queue.settings import Settings

_log = logging.getLogger(__name__)

_WATCH_INTERVAL = 0.1
_SHORT_LIFE = 10.0
"""Seconds. A part that lived longer than this starts again with a clean record."""

_CHANCES_BEFORE_READY = 3
"""Nothing is fed before the workers are ready, so a part that keeps dying by then is broken itself."""

_CHANCES_WHEN_READY = 10
"""A rollout that kills its worker is tried again before it is failed: that must not take the stack down."""

_LONGEST_BACKOFF = 30.0
_WITHOUT_LEASE = frozenset({"redis", "beat"})


class Part(Protocol):
    """A process of the stack."""

    log: Path
    process: subprocess.Popen[bytes] | None

    def spawn(self) -> None:
        """Start it, again if it ended."""


class CeleryPart:
    """A Celery worker, or beat."""

    def __init__(self, argv: list[str], log: Path, variables: Mapping[str, str]) -> None:
        self.argv = argv
        self.log = log
        self.variables = variables
        self.process: subprocess.Popen[bytes] | None = None

    def spawn(self) -> None:
        """Start it. Settings travel as environment variables: everybody can read a process's arguments."""
        self.process = spawn(self.argv, self.log, environment={**os.environ, **self.variables})


@dataclass
class _Record:
    """How a part has done so far. ``due`` is when to start it again; ``None`` while it runs."""

    started: float = field(default_factory=time.monotonic)
    short_lives: int = 0
    due: float | None = None


def celery_commands(run_dir: Path, workers: int, verifiers: int, suffix: str = "") -> dict[str, list[str]]:
    """Return the command of each Celery process by the name of its part (and of its log)."""
    celery = [sys.executable, "-m", "celery", "-A"]
    commands = {
        f"gpu{number}": [*celery, "workers.gpu", "worker", "-n", f"gpu{number}{suffix}@%h"]
        for number in range(1, workers + 1)
    }
    if verifiers:
        node = f"cpu{suffix}@%h"
        commands["cpu"] = [*celery, "workers.cpu", "worker", "-n", node, "--concurrency", str(verifiers)]
    if commands:  # a fleet that has all the workers has its own
        commands["beat"] = [*celery, "beat", "beat", "-s", str(run_dir / "beat-schedule")]
    return commands


class EmbeddedStack:
    """Everything that one run needs on this machine.

    Enter it on the main thread: the processes die with the thread that did (``children.spawn`` says why).
    With no ``workers`` and no ``verifiers`` it has no process but that of Redis: others do the work.
    ``redis_url`` is left alone where the user set it; otherwise a Redis of our own starts in
    ``run_dir/redis``, with what an earlier command left there, or without if ``fresh``. After entering,
    ``settings`` carry the URL to use. ``wait_ready`` before the work, and keep ``supervise`` running beside
    both.
    """

    def __init__(
        self, settings: Settings, run_dir: Path, *, workers: int, verifiers: int, fresh: bool = True
    ) -> None:
        self.settings = settings
        self.run_dir = run_dir.absolute()
        self.workers = workers
        self.verifiers = verifiers
        self.fresh = fresh
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
            from gym_queue.embedded.preflight import check_redis  # noqa: PLC0415 - redis-py loads slowly

            await asyncio.to_thread(check_redis, self.settings.redis_url)
            self._suffix = (
                f"-{os.getpid()}"  # others may share that Redis; two workers of one name confuse it
            )
        else:
            self._redis = RedisServer(self.run_dir / "redis", logs / "redis.log", fresh=self.fresh)
            self._add("redis", self._redis)
            await asyncio.to_thread(self._redis.wait_ready)
            self.settings = self.settings.model_copy(update={"redis_url": self._redis.url})
        variables = environment(self.settings)
        commands = celery_commands(self.run_dir, self.workers, self.verifiers, self._suffix)
        for name, argv in commands.items():
            self._add(name, CeleryPart(argv, logs / f"{name}.log", variables))

    def _add(self, name: str, part: Part) -> None:
        self.parts[name] = part
        part.spawn()
        self._records[name] = _Record()

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
            if name not in _WITHOUT_LEASE and (part.process is None or part.process.pid not in pids)
        ]

    async def supervise(self, died: Callable[[int], object] | None = None) -> None:
        """Start what died again, each time a little later, until cancelled.

        ``died`` is told the id of each process that died, so that its work can be given back at once: nobody
        else knows it to be dead before its lease has run out.

        Raises:
            StackError: a part keeps dying; the sentence has its last words.
        """
        while True:
            for name, part in self.parts.items():
                pid = self._look_after(name, part, self._records[name])
                if pid is not None and died is not None:
                    died(pid)
            await asyncio.sleep(_WATCH_INTERVAL)

    def _look_after(self, name: str, part: Part, record: _Record) -> int | None:
        """Start a part that is due, or note one that died and return the id it had."""
        now = time.monotonic()
        if record.due is not None:
            if now >= record.due:
                part.spawn()
                record.started, record.due = now, None
            return None
        process = part.process
        status = process.poll() if process else None
        if process is None or status is None:
            return None
        record.short_lives = record.short_lives + 1 if now - record.started < _SHORT_LIFE else 1
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        chances = _CHANCES_WHEN_READY if self._ready else _CHANCES_BEFORE_READY
        if record.short_lives >= chances:
            times = f"{record.short_lives} times in a row"
            msg = f"{name} {how}, {times}; its last words ({part.log}): {last_words(part.log)}"
            raise StackError(msg)
        delay = min(_LONGEST_BACKOFF, 0.5 * 2.0 ** (record.short_lives - 1))
        record.due = now + delay
        _log.warning("%s %s; it starts again in %g s (log: %s)", name, how, delay, part.log)
        return process.pid

    async def stop(self, grace: float) -> None:
        """End all parts: TERM, up to ``grace`` seconds for workers to finish, KILL. Redis goes last."""
        celery = [part.process for name, part in self.parts.items() if name != "redis" and part.process]
        for process in celery:
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_all_ended(celery), grace)
        for process in celery:
            kill_session(process)
        if self._redis is not None:
            await asyncio.to_thread(self._redis.stop)
        self.parts.clear()


async def _all_ended(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        while process.poll() is None:  # noqa: ASYNC110 - the kernel tells nobody but who asks
            await asyncio.sleep(_WATCH_INTERVAL / 2)
