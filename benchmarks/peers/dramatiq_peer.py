"""dramatiq on Redis: no-op actors without results, two processes of its default eight threads."""

from __future__ import annotations

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from benchmarks import measurement
from benchmarks.peers import tally

dramatiq.set_broker(RedisBroker(url=f"unix://{os.environ['BENCHMARK_REDIS_SOCKET']}"))


@dramatiq.actor
def noop(_number: int) -> None:
    """Do nothing."""
    tally.add()


class Peer:
    """Who sends the messages."""

    def __init__(self) -> None:
        self._tally = tally.Tally()

    def send(self, count: int) -> None:
        """See ``measurement.Client``."""
        for number in range(count):
            noop.send(number)

    def wait(self, count: int) -> None:
        """See ``measurement.Client``."""
        self._tally.wait(count)


if __name__ == "__main__":
    measurement.main(Peer)
