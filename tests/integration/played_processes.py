"""Processes that a stack runs in place of Celery's, for tests of the stack."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from redis import Redis

from gym_queue.embedded import stack as stack_module

if TYPE_CHECKING:
    import pytest

# A worker that says under its name that it is there, then lives until it is told to end.
WORKER = textwrap.dedent(
    """
    import os, signal, sys
    from redis import Redis
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    name = sys.argv[1]
    with Redis.from_url(os.environ["GYM_QUEUE_REDIS_URL"]) as client:
        client.hset("pids", name, os.getpid())
    print(name, "is up", flush=True)
    while True:
        signal.pause()
    """
)


def play(monkeypatch: pytest.MonkeyPatch, commands: dict[str, list[str]]) -> None:
    """Let the stack run these commands instead of Celery's."""
    monkeypatch.setattr(stack_module, "celery_commands", lambda *_: commands)


def worker(name: str, program: str = WORKER) -> list[str]:
    return [sys.executable, "-c", program, name]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Pids:
    """The processes that said they are there, by name."""

    def __init__(self, url: str) -> None:
        self.client = Redis.from_url(url, decode_responses=True)

    def read(self) -> dict[str, int]:
        return {str(name): int(pid) for name, pid in self.client.hgetall("pids").items()}

    async def ready(self) -> set[int]:
        return set(self.read().values())
