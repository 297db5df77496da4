"""The limit: redis-py and nothing else. ``list``: a push and a blocking pop a task. ``stream``: pipelined
batches of a stream with a consumer group, read and acknowledged hundreds at a time.

Nothing is decoded, no task has a name, nothing is kept of what was done.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from redis import Redis

from benchmarks import measurement
from benchmarks.peers import tally

_KEY, _GROUP = "bare", "workers"
_BATCH = 500
_STREAM = os.environ.get("BENCHMARK_VARIANT") == "stream"
_BODY = b"x" * 200


def _connect() -> Any:
    return Redis(unix_socket_path=os.environ["BENCHMARK_REDIS_SOCKET"], socket_timeout=None)  # workers wait


class Peer:
    """Who pushes."""

    def __init__(self) -> None:
        self._tally = tally.Tally()
        self._redis = _connect()

    def send(self, count: int) -> None:
        """See ``measurement.Client``."""
        if not _STREAM:
            for _ in range(count):
                self._redis.lpush(_KEY, _BODY)
            return
        for start in range(0, count, _BATCH):
            pipeline = self._redis.pipeline(transaction=False)
            for _ in range(min(_BATCH, count - start)):
                pipeline.xadd(_KEY, {"b": _BODY})
            pipeline.execute()

    def wait(self, count: int) -> None:
        """See ``measurement.Client``."""
        self._tally.wait(count)


def work() -> None:
    """Be a worker."""
    redis = _connect()
    if not _STREAM:
        while True:
            redis.brpop(_KEY)
            tally.add()
    try:
        redis.xgroup_create(_KEY, _GROUP, id="0", mkstream=True)
    except Exception as error:
        if "BUSYGROUP" not in str(error):
            raise
    while True:
        answer: Any = redis.xreadgroup(_GROUP, str(os.getpid()), {_KEY: ">"}, count=_BATCH, block=0)
        streams = answer.items() if isinstance(answer, dict) else answer
        for _, entries in streams:
            flat = entries[0] if isinstance(answer, dict) else entries
            redis.xack(_KEY, _GROUP, *(position for position, _ in flat))
            for _ in flat:
                tally.add()


if __name__ == "__main__":
    if sys.argv[1:] == ["work"]:
        work()
    else:
        measurement.main(Peer)
