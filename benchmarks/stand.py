"""A contender on its stand: its workers, its head, and a Redis of its own with the settings of all others."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import redis

from gym_queue import names
from gym_queue.embedded.children import kill_session, last_words, spawn
from gym_queue.embedded.redis import RedisServer
from gym_queue.testing import wait_until

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping, Sequence

    from benchmarks.measurement import Sample

ROOT = Path(__file__).parents[1]
_PATIENCE = 900.0
_HEAD = ("-m", "gym_queue.cli.main", "head", "--port", "0")
_HEAD_VARIABLES = {"GYM_QUEUE_RATE_LIMIT": "0", "GYM_QUEUE_AUTH_TOKEN": ""}


@dataclass(frozen=True)
class Contender:
    """Who takes part: ``client`` is the command of who sends the work, ``workers`` and ``verifiers`` those of
    who does it, all as arguments of ``python``. With a ``head``, the client is told its URL. It
    ``drains`` if its queue can be filled before work begins.
    """

    name: str
    client: Sequence[str]
    workers: Sequence[Sequence[str]] = ()
    verifiers: Sequence[Sequence[str]] = ()
    python: str = sys.executable
    variables: Mapping[str, str] = field(default_factory=dict)
    ours: bool = False
    head: bool = False
    drains: bool = True


class Stand:
    """See the module's docstring. Up between ``__enter__`` and ``__exit__``."""

    def __init__(self, contender: Contender, folder: Path) -> None:
        self.contender = contender
        self.folder = folder / "".join(c if c.isalnum() else "-" for c in contender.name)
        self._redis = RedisServer(self.folder / "redis")
        self._processes: list[tuple[str, Path, subprocess.Popen[bytes]]] = []
        self._head_log = self.folder / "head.log"
        self.variables: dict[str, str] = {}

    @property
    def redis_url(self) -> str:
        """The address of its Redis."""
        return self._redis.url

    def __enter__(self) -> Self:
        (self.folder / "tally").mkdir(parents=True)
        self._redis.start()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.variables = {
            **os.environ,
            "BENCHMARK_REDIS_SOCKET": str(self._redis.socket_path),
            "BENCHMARK_TALLY": str(self.folder / "tally"),
            "GYM_QUEUE_REDIS_URL": self._redis.url,
            "PYTHONPATH": path,
            **self.contender.variables,
        }
        commands = [("workers", argv) for argv in self.contender.workers]
        commands += [("verifiers", argv) for argv in self.contender.verifiers]
        for number, (kind, argv) in enumerate(commands):
            log = self.folder / f"worker{number}.log"
            numbered = [part.replace("%number", str(number)) for part in argv]
            process = spawn([self.contender.python, *numbered], log, environment=self.variables, cwd=ROOT)
            self._processes.append((kind, log, process))
        if self.contender.ours:
            wait_until(self._leased, 60, what=f"the workers of {self.contender.name}")
        if self.contender.head:
            variables = self.variables | _HEAD_VARIABLES | {"GYM_QUEUE_RUNS_DIR": str(self.folder / "runs")}
            process = spawn([sys.executable, *_HEAD], self._head_log, environment=variables, cwd=ROOT)
            self._processes.append(("head", self._head_log, process))
            wait_until(self._head_url, 60, what=f"the head of {self.contender.name}")

    def _head_url(self) -> str:
        """Return where the head listens, nothing while it does not."""
        self.check()
        found = re.search(r"listens on (http://\S+)", self._head_log.read_text())
        return found[1] if found else ""

    def _leased(self) -> bool:
        self.check()
        with redis.Redis.from_url(self._redis.url) as client:
            return bool(client.zcard(names.leases_key()) == len(self._processes))

    def check(self) -> None:
        """Raise if one of its processes has ended."""
        for kind, log, process in self._processes:
            if process.poll() is not None:
                msg = f"one of the {kind} of {self.contender.name} ended: {last_words(log)}"
                raise RuntimeError(msg)

    def measure(self, *arguments: object) -> Sample:
        """Let a client of its own process measure, and return what it found."""
        argv = [self.contender.python, *self.contender.client, *map(str, arguments)]
        argv += ["--redis-socket", str(self._redis.socket_path)]
        if self._redis.process:
            argv += ["--process", f"redis={self._redis.process.pid}"]
        for kind, _, process in self._processes:
            argv += ["--process", f"{kind}={process.pid}"]
        if self.contender.head:
            argv += ["--head", self._head_url()]
        log = self.folder / "client.log"
        log.unlink(missing_ok=True)
        client = spawn(argv, log, environment=self.variables, cwd=ROOT)
        try:
            wait_until(lambda: self._ended(client), _PATIENCE, what=f"the client of {self.contender.name}")
        finally:
            kill_session(client)
        if client.returncode != 0:
            msg = f"the client of {self.contender.name} ended with {client.returncode}: {last_words(log)}"
            raise RuntimeError(msg)
        sample: Sample = json.loads(log.read_text().splitlines()[-1])
        return sample

    def _ended(self, client: subprocess.Popen[bytes]) -> bool:
        self.check()
        return client.poll() is not None

    def __exit__(self, *_error: object) -> None:
        for _, _, process in reversed(self._processes):
            kill_session(process)
        self._processes.clear()
        self._redis.stop()
