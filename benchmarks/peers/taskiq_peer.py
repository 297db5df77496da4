"""taskiq on a Redis list: no-op async tasks without results, two worker processes."""

from __future__ import annotations

import asyncio
import os

from taskiq_redis import ListQueueBroker

from benchmarks import measurement
from benchmarks.peers import tally

broker = ListQueueBroker(f"unix://{os.environ['BENCHMARK_REDIS_SOCKET']}")
_AT_ONCE = 64


@broker.task(task_name="noop")
async def noop(_number: int) -> None:
    """Do nothing."""
    tally.add()


class Peer:
    """Who sends the messages, many at a time."""

    def __init__(self) -> None:
        self._tally = tally.Tally()
        self._runner = asyncio.Runner()
        self._runner.run(broker.startup())

    def send(self, count: int) -> None:
        """See ``measurement.Client``."""
        self._runner.run(self._send(count))

    async def _send(self, count: int) -> None:
        for start in range(0, count, _AT_ONCE):
            await asyncio.gather(*(noop.kiq(number) for number in range(start, min(start + _AT_ONCE, count))))

    def wait(self, count: int) -> None:
        """See ``measurement.Client``."""
        self._tally.wait(count)


if __name__ == "__main__":
    measurement.main(Peer)
