"""Plain Celery in its own configuration: no-op tasks in a group, with the Redis backend or no results."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery, group

from benchmarks import measurement
from benchmarks.peers import tally

_URL = f"redis+socket://{os.environ['BENCHMARK_REDIS_SOCKET']}"
_WITH_RESULTS = os.environ.get("BENCHMARK_VARIANT") != "ignore_result"
app = Celery("celery_peer", broker=_URL, backend=_URL if _WITH_RESULTS else None)
app.conf.broker_connection_retry_on_startup = True


@app.task(name="noop", ignore_result=not _WITH_RESULTS)
def noop(number: int) -> int:
    """Do nothing."""
    if not _WITH_RESULTS:
        tally.add()
    return number


class Peer:
    """Who sends the group and awaits its results."""

    def __init__(self) -> None:
        self._tally = None if _WITH_RESULTS else tally.Tally()
        self._sent: Any = None

    def send(self, count: int) -> None:
        """See ``measurement.Client``."""
        self._sent = group(noop.s(number) for number in range(count)).apply_async()

    def wait(self, count: int) -> None:
        """See ``measurement.Client``."""
        if self._tally is not None:
            self._tally.wait(count)
        elif self._sent.get(timeout=300) != list(range(count)):
            msg = f"the group of {count} came back incomplete"
            raise RuntimeError(msg)
        else:
            self._sent.forget()


if __name__ == "__main__":
    measurement.main(Peer)
