"""The yardstick: a plain Celery group of no-op tasks with the Redis backend, in Celery's own configuration.

``celery -A benchmarks.plain worker`` is the worker; run as a program this is who sends the group and awaits
its results. The address of Redis comes in ``PLAIN_REDIS_URL``.
"""

from __future__ import annotations

import argparse
import json
import os
import time

from celery import Celery, group

from benchmarks.processes import cpu_seconds, own_peak_megabytes, peak_megabytes

_URL = os.environ.get("PLAIN_REDIS_URL", "redis://127.0.0.1:6379/0")

app = Celery("plain", broker=_URL, backend=_URL)


@app.task(name="plain.noop")  # type: ignore[untyped-decorator]  # Celery has no annotations
def noop(number: int) -> int:
    """Do nothing."""
    return number


def collect(count: int) -> None:
    """Send ``count`` tasks as one group and await all results."""
    results = group(noop.s(number) for number in range(count)).apply_async().get(timeout=600)
    if results != list(range(count)):
        msg = f"the group of {count} came back incomplete"
        raise RuntimeError(msg)


def main() -> None:
    """Measure one group and print what it cost, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, required=True)
    parser.add_argument("--warm-up", type=int, default=100)
    parser.add_argument("--redis-pid", type=int, required=True)
    parser.add_argument("--worker-pids", type=int, nargs="+", required=True)
    options = parser.parse_args()
    collect(options.warm_up)
    processes = {"workers": options.worker_pids, "redis": [options.redis_pid]}
    before = {name: sum(map(cpu_seconds, pids)) for name, pids in processes.items()}
    own, started = time.process_time(), time.perf_counter()
    collect(options.tasks)
    seconds, own = time.perf_counter() - started, time.process_time() - own
    cpu = {name: sum(map(cpu_seconds, pids)) - before[name] for name, pids in processes.items()}
    memory = {name: max(map(peak_megabytes, pids)) for name, pids in processes.items()}
    print(
        json.dumps(
            {
                "rate": options.tasks / seconds,
                "cpu": {name: 1e6 * spent / options.tasks for name, spent in (cpu | {"client": own}).items()},
                "memory": memory | {"client": own_peak_megabytes()},
            }
        )
    )


if __name__ == "__main__":
    main()
