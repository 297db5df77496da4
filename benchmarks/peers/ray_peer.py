"""Ray: no-op tasks whose results are fetched, two CPUs. It brings its own store instead of Redis."""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import ray

from benchmarks import measurement
from benchmarks.processes import cpu_of, descendants, memory_in_all, peak_of


@ray.remote
def noop(number: int) -> int:
    """Do nothing."""
    return number


class Peer:
    """The driver."""

    def __init__(self) -> None:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        self._sent: list[Any] = []

    def send(self, count: int) -> None:
        """See ``measurement.Client``."""
        self._sent = [noop.remote(number) for number in range(count)]

    def wait(self, count: int) -> None:
        """See ``measurement.Client``."""
        if ray.get(self._sent) != list(range(count)):
            msg = f"the {count} tasks came back incomplete"
            raise RuntimeError(msg)


def main() -> None:
    """Measure; all of Ray's processes are this one's descendants."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", type=int, required=True)
    parser.add_argument("--warm-up", type=int, default=200)
    measurement.add_arguments(parser)
    options = parser.parse_args()
    peer = Peer()
    peer.send(options.warm_up)
    peer.wait(options.warm_up)
    before, own, started = cpu_of(descendants(os.getpid())), time.process_time(), time.perf_counter()
    peer.send(options.tasks)
    peer.wait(options.tasks)
    seconds = time.perf_counter() - started
    pids = descendants(os.getpid())
    spent = {"workers": cpu_of(pids) - before, "client": time.process_time() - own}
    each = {name: 1e6 * cpu / options.tasks for name, cpu in spent.items()}
    memory = {"workers": sum(map(peak_of, pids)), "client": peak_of(os.getpid())}
    in_all = memory_in_all({"workers": pids, "client": [os.getpid()]})
    ray.shutdown()
    rate = options.tasks / seconds
    print(json.dumps({"rate": rate, "cpu": each, "memory": memory, "in_all": in_all, "commands": {}}))


if __name__ == "__main__":
    main()
