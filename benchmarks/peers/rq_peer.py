"""rq: no-op jobs whose results are dropped, two ``SimpleWorker`` (no fork a job: the fastest it has)."""

from __future__ import annotations

import os
import sys

from redis import Redis
from rq import Queue, SimpleWorker

from benchmarks import measurement
from benchmarks.peers import tally

_BATCH = 500


def noop(_number: int) -> None:
    """Do nothing."""
    tally.add()


class Peer:
    """Who enqueues the jobs."""

    def __init__(self) -> None:
        self._tally = tally.Tally()
        self._queue = Queue(connection=Redis(unix_socket_path=os.environ["BENCHMARK_REDIS_SOCKET"]))

    def send(self, count: int) -> None:
        """See ``measurement.Client``."""
        name = "benchmarks.peers.rq_peer.noop"
        for start in range(0, count, _BATCH):
            numbers = range(start, min(start + _BATCH, count))
            self._queue.enqueue_many(
                [Queue.prepare_data(name, (number,), result_ttl=0) for number in numbers]
            )

    def wait(self, count: int) -> None:
        """See ``measurement.Client``."""
        self._tally.wait(count)


def work() -> None:
    """Be a worker."""
    connection = Redis(unix_socket_path=os.environ["BENCHMARK_REDIS_SOCKET"])
    SimpleWorker([Queue(connection=connection)], connection=connection).work(logging_level="WARNING")


if __name__ == "__main__":
    if sys.argv[1:] == ["work"]:
        work()
    else:
        measurement.main(Peer)
