"""What may stand between a ledger and its Redis: a bad network, and Sentinels."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Self

import redis

from gym_queue.embedded.children import kill_session, last_words, spawn
from gym_queue.embedded.redis import find_redis_server
from gym_queue.ledger.redis import RedisLedger
from gym_queue.testing import wait_until

if TYPE_CHECKING:
    import subprocess
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    import pytest


@contextlib.asynccontextmanager
async def ledger_at(url: str, *, patient: bool = True) -> AsyncIterator[RedisLedger]:
    ledger = RedisLedger(url, patient=patient)
    try:
        yield ledger
    finally:
        await ledger.close()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("gym_queue")]


class Network:
    """Carries bytes between TCP clients and the Redis on a unix socket, as well as it is told to."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._tasks: set[asyncio.Task[None]] = set()
        self._gate = asyncio.Event()
        self._gate.set()
        self.answers_to_lose = 0
        self.stalled = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"redis://127.0.0.1:{port}/0"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def stall(self) -> None:
        """Hold all bytes back, without a word; ``stalled`` counts the pieces."""
        self.stalled = 0
        self._gate.clear()

    def lead_to(self, socket: str) -> None:
        """Let new connections arrive elsewhere."""
        self._socket = socket

    def heal(self) -> None:
        """Deliver what was held back, also what was given up by its sender."""
        self._gate.set()

    def deafen(self) -> None:
        """Hold back, for ever, what comes through the connections that stand; new ones are well."""
        self._gate.clear()
        self._gate = asyncio.Event()
        self._gate.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await asyncio.open_unix_connection(self._socket)
        ways = [
            asyncio.create_task(self._carry(reader, upstream[1], answers=False)),
            asyncio.create_task(self._carry(upstream[0], writer, answers=True)),
        ]
        self._tasks.update(ways)
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for end in (upstream[1], writer):
            end.close()

    async def _carry(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, answers: bool
    ) -> None:
        gate = self._gate
        with contextlib.suppress(ConnectionError):
            while piece := await source.read(1 << 16):
                if answers and self.answers_to_lose:
                    self.answers_to_lose -= 1
                    return
                if not gate.is_set():
                    self.stalled += 1
                    await gate.wait()
                sink.write(piece)
                await sink.drain()


class Sentinels:
    """A master and a replica, and one Sentinel (a majority of itself) that watches them."""

    def __init__(self, folder: Path, ports: Sequence[int]) -> None:
        self.folder = folder
        self.master, self.replica, self.sentinel = ports
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.url = f"sentinel://127.0.0.1:1,127.0.0.1:{self.sentinel}/0?master=main"
        """The first of the Sentinels is not there: one must be enough."""

    def __enter__(self) -> Self:
        try:
            self._start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_all(self) -> None:
        self.start(self.master)
        self.start(self.replica, "--replicaof", "127.0.0.1", str(self.master))
        with self.client(self.replica) as client:
            wait_until(lambda: client.info()["master_link_status"] == "up", what="replication")
        settings = self.folder / "sentinel.conf"
        settings.write_text(
            f"port {self.sentinel}\n"
            f"sentinel monitor main 127.0.0.1 {self.master} 1\n"
            "sentinel down-after-milliseconds main 500\n"
            "sentinel failover-timeout main 3000\n"
        )
        self._spawn(self.sentinel, [str(settings), "--sentinel"])
        with self.client(self.sentinel) as client:
            wait_until(lambda: len(client.sentinel_slaves("main")) == 1, what="Sentinel's view", timeout=30)

    def start(self, port: int, *arguments: str) -> None:
        self._spawn(port, ["--port", str(port), "--save", "", "--appendonly", "no", *arguments])

    def _spawn(self, port: int, arguments: Sequence[str]) -> None:
        log = self.folder / f"{port}.log"
        process = spawn([find_redis_server(), *arguments, "--bind", "127.0.0.1"], log, cwd=self.folder)
        self.processes[port] = process
        with self.client(port) as client:

            def answers() -> bool:
                assert process.poll() is None, last_words(log)
                with contextlib.suppress(redis.ConnectionError):
                    return bool(client.ping())
                return False

            wait_until(answers, what="redis-server")

    def client(self, port: int) -> redis.Redis:
        return redis.Redis(port=port, decode_responses=True)

    def kill_the_master(self) -> None:
        """With all that it took safe on the replica: replication promises no more than that."""
        with self.client(self.master) as client:
            assert client.wait(1, 5000) == 1
        self.processes[self.master].kill()

    def swap(self) -> bool:
        """Let master and replica change places. Returns false if the Sentinel finds the replica unfit yet."""
        with self.client(self.sentinel) as client:
            try:
                client.sentinel_failover("main")
            except redis.ResponseError as error:
                if "NOGOODSLAVE" not in str(error):
                    raise
                return False
            return True

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.terminate()
            kill_session(process)
