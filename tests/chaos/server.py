"""A Redis with an append-only file that can be stopped, killed, cut off from the mains, and started again."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from gym_queue.embedded.redis import find_redis_server
from gym_queue.testing import async_wait_until

if TYPE_CHECKING:
    import signal
    from collections.abc import Sequence

    from tests.chaos.processes import Part, Processes

_SETTINGS = {
    "appendonly": "yes",
    "appendfsync": "everysec",
    "aof-load-truncated": "yes",
    "auto-aof-rewrite-percentage": "0",  # so that the file only grows, and its end is the newest
    "save": "",
    "maxmemory-policy": "noeviction",
    "protected-mode": "no",
}
_LOOK_INTERVAL = 0.1
_UNSYNCED = 1.0
"""Seconds of writes that a machine which loses its power may lose, with ``appendfsync everysec``."""


def free_port() -> int:
    """Return a port below those that the kernel gives to clients: one that waits for the server to come back
    must not be given the server's own port meanwhile.
    """
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(low // 2, low)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """A redis-server among the processes of a stack; ``addresses`` are where it listens besides loopback."""

    def __init__(self, processes: Processes, addresses: Sequence[str] = ()) -> None:
        self._data = processes.folder / "redis-data"
        self._data.mkdir()
        self._processes = processes
        self._sizes: deque[int] = deque(maxlen=round(_UNSYNCED / _LOOK_INTERVAL))
        self.port = free_port()
        self.client = aioredis.Redis(port=self.port, socket_timeout=5.0, retry=Retry(NoBackoff(), 0))
        settings = {"port": str(self.port), "dir": str(self._data), **_SETTINGS}
        flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
        argv = [find_redis_server(), *flags, "--bind", "127.0.0.1", *addresses]
        self.part: Part = processes.add("redis", argv)

    def url(self, address: str = "127.0.0.1") -> str:
        """Return the server's URL as seen from where it has this address."""
        return f"redis://{address}:{self.port}/0"

    async def ready(self) -> None:
        """Wait until it answers; not so while it loads its file."""

        async def answers() -> bool:
            with contextlib.suppress(RedisError):
                return bool(await self.client.ping())
            return False

        await async_wait_until(answers, 30, what="redis-server to answer")

    async def watch(self) -> None:
        """Remember how long the file was. Ends only by being cancelled."""
        while True:
            self._sizes.append(self._file().stat().st_size if self._exists() else 0)
            await asyncio.sleep(_LOOK_INTERVAL)

    async def down(self, number: signal.Signals, *, unsynced: bool = False) -> None:
        """End the server and wait until it is gone. ``unsynced``: its writes of the last second are lost."""
        part = self.part
        part.wanted = False
        length = self._sizes[0] if self._sizes else 0
        part.end(number)
        await async_wait_until(lambda: part.process is None, 15, what="redis-server to end")
        if unsynced and self._exists():
            with self._file().open("r+b") as file:
                file.truncate(min(length, self._file().stat().st_size))

    async def up(self) -> None:
        """Start it again and wait until it answers."""
        if not self.part.wanted:
            self._sizes.clear()
            self._processes.start(self.part)
        await self.ready()

    def _exists(self) -> bool:
        return any(self._data.rglob("*.aof"))

    def _file(self) -> Path:
        """Return the file that grows: from Redis 7 on there are several, and the last one does."""
        return max(self._data.rglob("*.aof"), key=lambda path: path.name)
