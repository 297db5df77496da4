"""How a client measures what its work costs everybody: in one way for all, in whatever virtualenv it runs.

Imports the standard library only. A contender's client is a program that sends work and knows when it is
done; ``main`` turns that into one line of JSON, a ``Sample``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.processes import cpu_seconds, memory_in_all, own_peak_megabytes, peak_megabytes, session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

Sample = dict[str, Any]
"""``rate`` and ``drain`` (a second), ``cpu`` (µs each, by process), ``memory`` (peak MB of the largest, by
process), ``in_all`` (MB of all processes when the measured run has just ended: ``processes.memory_in_all``),
``commands`` (of Redis, each) and what a workload adds.
"""

_CALLS = re.compile(r"cmdstat_([^:]+):calls=(\d+),usec=(\d+)")
_BY_SCRIPT = "evalsha"


class Client(Protocol):
    """Who sends work."""

    def send(self, count: int) -> None:
        """Send so many tasks."""
        ...

    def wait(self, count: int) -> None:
        """Return when the tasks that were sent last, so many, are done."""
        ...


def _ask_redis(path: str, command: str) -> str:
    """Return what Redis answers, through its unix socket and without a driver; nothing to a mere "OK"."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(f"{command}\r\n".encode())
        with connection.makefile("rb") as answer:
            kind = answer.readline()
            return answer.read(int(kind[1:])).decode() if kind.startswith(b"$") else ""


def redis_calls(path: str) -> dict[str, tuple[int, int]]:
    """Return by command how often Redis ran it, and for how many µs in all. Those that a script calls count
    beside the script.
    """
    found = _CALLS.findall(_ask_redis(path, "INFO commandstats"))
    return {name: (int(calls), int(microseconds)) for name, calls, microseconds in found}


@dataclass
class Stage:
    """What is measured: the processes by their name, each the leader of a session, and the Redis."""

    processes: dict[str, list[int]]
    redis_socket: str

    @classmethod
    def parse(cls, options: argparse.Namespace) -> Stage:
        """Read what ``add_arguments`` added."""
        processes: dict[str, list[int]] = {}
        for one in options.process:
            name, _, pid = one.partition("=")
            processes.setdefault(name, []).append(int(pid))
        return cls(processes, options.redis_socket)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all workers: to stand still, or to go on."""
        for name in ("workers", "verifiers"):
            for pid in self.processes.get(name, ()):
                os.killpg(pid, number)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every client is told of its surroundings."""
    parser.add_argument("--process", action="append", default=[], metavar="NAME=PID")
    parser.add_argument("--redis-socket", default="")
    parser.add_argument("--drain", action="store_true", help="fill the queue first; measure this alone")


@dataclass
class Costs:
    """What was spent while it was measured, in seconds of CPU and calls of Redis."""

    cpu: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    redis_microseconds: dict[str, int] = field(default_factory=dict)

    def each(self, count: int) -> Sample:
        """Return the costs of each of ``count`` tasks."""
        by_client = {name: calls for name, calls in self.calls.items() if name != "info"}
        return {
            "cpu": {name: 1e6 * spent / count for name, spent in self.cpu.items()},
            "commands": {name: calls / count for name, calls in by_client.items() if calls / count >= 0.01},  # noqa: PLR2004
            "redis_microseconds": {
                name: spent / count
                for name, spent in self.redis_microseconds.items()
                if spent / count >= 0.1  # noqa: PLR2004
            },
        }


@contextlib.contextmanager
def costs(stage: Stage) -> Iterator[Costs]:
    """Measure what the block costs every process of a stage, and this one."""
    found = Costs()
    if stage.redis_socket:
        _ask_redis(stage.redis_socket, "MEMORY PURGE")  # what the round before left free
    calls = redis_calls(stage.redis_socket) if stage.redis_socket else {}
    before = {name: sum(map(cpu_seconds, pids)) for name, pids in stage.processes.items()}
    own = time.process_time()
    yield found
    found.cpu = {name: sum(map(cpu_seconds, pids)) - before[name] for name, pids in stage.processes.items()}
    found.cpu["client"] = time.process_time() - own
    now = redis_calls(stage.redis_socket) if stage.redis_socket else {}
    found.calls = {name: count - calls.get(name, (0, 0))[0] for name, (count, _) in now.items()}
    found.redis_microseconds = {name: spent - calls.get(name, (0, 0))[1] for name, (_, spent) in now.items()}


def memory(stage: Stage) -> Mapping[str, float]:
    """Return the peak MB of the largest session of each name, and of this process; ``in redis`` is what Redis
    itself had allocated at its peak, without what its allocator could not give back.
    """
    found = {name: max(map(peak_megabytes, pids)) for name, pids in stage.processes.items()}
    if stage.redis_socket:
        said = re.search(r"used_memory_peak:(\d+)", _ask_redis(stage.redis_socket, "INFO memory"))
        found["in redis"] = int(said.group(1)) / 1e6 if said else 0.0
    return found | {"client": own_peak_megabytes()}


def in_all(stage: Stage) -> Mapping[str, float]:
    """Return the MB that all sessions, and this process, take now (``processes.memory_in_all``)."""
    groups = {
        name: [pid for leader in pids for pid in session(leader)] for name, pids in stage.processes.items()
    }
    return memory_in_all(groups | {"client": [os.getpid()]})


def measure(client: Client, stage: Stage, tasks: int, warm_up: int, *, drain: bool) -> Sample:
    """Measure a client end to end, or how fast workers ``drain`` what is in the queue already."""
    client.send(warm_up)
    client.wait(warm_up)
    if drain:
        return {"drain": tasks / _drain(client, stage, tasks)}
    with costs(stage) as spent:
        started = time.perf_counter()
        client.send(tasks)
        client.wait(tasks)
        seconds = time.perf_counter() - started
    sample: Sample = {"rate": tasks / seconds, **spent.each(tasks), "in_all": in_all(stage)}
    return sample | {"memory": memory(stage)}


def _drain(client: Client, stage: Stage, tasks: int) -> float:
    """Return how many seconds it takes once the workers may begin."""
    stage.signal(signal.SIGSTOP)
    try:
        client.send(tasks)
    finally:
        stage.signal(signal.SIGCONT)
    started = time.perf_counter()
    client.wait(tasks)
    return time.perf_counter() - started


def main(make: Callable[[], Client], arguments: Sequence[str] | None = None) -> None:
    """Run a contender's client from the command line and print its sample as JSON."""
    parser = argparse.ArgumentParser(description="Measures one contender; started by python -m benchmarks.")
    parser.add_argument("--tasks", type=int, required=True)
    parser.add_argument("--warm-up", type=int, default=200)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    stage = Stage.parse(options)
    print(json.dumps(measure(make(), stage, options.tasks, options.warm_up, drain=options.drain)))
