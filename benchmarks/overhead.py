"""The overhead of the road: no-op rollouts end to end, against a plain Celery group of no-op tasks.

    python -m benchmarks.overhead [--rollouts N] [--rounds N] [--json FILE]

Both sides get a redis-server of their own (the same binary and settings: append-only file, unix socket) and
two worker processes. Each round measures plain Celery, then the road at each group size, each from a fresh
client process, so that what else the machine does falls on all alike. Shown are medians over the rounds, with
the least and the most.

A rollout of the road: its example is read, accepted and published, claimed, answered by the stub engine,
verified, committed, and its row is on disk. A task of the yardstick: sent, run, and its result is with the
client.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.processes import Machine, describe_machine
from gym_queue.embedded.children import kill_session, last_words, spawn
from gym_queue.embedded.redis import RedisServer
from gym_queue.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[1]
WORKERS = 2
GROUP_SIZES = (1, 8)
TARGETS = {1: 1.5, 8: 4.0}
PLAIN = "plain Celery"

Sample = dict[str, Any]


class Side:
    """One side of the comparison: its Redis and its workers, up until ``stop``."""

    def __init__(self, name: str, folder: Path, commands: Sequence[Sequence[str]], variable: str) -> None:
        self.name = name
        self._folder = folder / name
        self._commands = commands
        self._variable = variable
        self._redis = RedisServer(self._folder / "redis")
        self._workers: list[subprocess.Popen[bytes]] = []
        self.variables: dict[str, str] = {}

    def start(self) -> None:
        """Start Redis, then the workers; return when they are ready."""
        self._redis.start()
        url = self._redis.url
        if self._variable == "PLAIN_REDIS_URL":  # kombu's spelling of a unix socket
            url = f"redis+socket://{self._redis.socket_path}"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.variables = {**os.environ, self._variable: url, "PYTHONPATH": path}
        logs = []
        for number, command in enumerate(self._commands):
            log = self._folder / f"worker{number}.log"
            argv = [sys.executable, "-m", "celery", *command, "-n", f"worker{number}@%h"]
            self._workers.append(spawn(argv, log, environment=self.variables, cwd=ROOT))
            logs.append(log)
        wait_until(lambda: self._ready(logs), 60, what=f"the workers of {self.name}")

    def _ready(self, logs: Sequence[Path]) -> bool:
        """Ask Celery's remote control, which workers answer once they are consuming."""
        for worker, log in zip(self._workers, logs, strict=True):
            if worker.poll() is not None:
                msg = f"a worker of {self.name} ended: {last_words(log)}"
                raise RuntimeError(msg)
        answer = subprocess.run(  # noqa: S603 - Celery's own command
            [sys.executable, "-m", "celery", *self._commands[0][:2], "inspect", "--timeout", "1", "ping"],
            env=self.variables,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        return answer.stdout.count("pong") == len(self._workers)

    def measure(self, module: str, *arguments: object) -> Sample:
        """Let a client of its own measure, and return what it found."""
        pids = [str(process.pid) for process in (self._redis.process, *self._workers) if process]
        argv = [sys.executable, "-m", module, *map(str, arguments), "--redis-pid", pids[0]]
        log = self._folder / "client.log"
        log.unlink(missing_ok=True)
        client = spawn([*argv, "--worker-pids", *pids[1:]], log, environment=self.variables, cwd=ROOT)
        try:
            status = client.wait(600)
        finally:
            kill_session(client)
        if status != 0:
            msg = f"{module} ended with status {status}: {last_words(log)}"
            raise RuntimeError(msg)
        sample: Sample = json.loads(log.read_text().splitlines()[-1])
        return sample

    def stop(self) -> None:
        """End the workers, then Redis."""
        for worker in self._workers:
            kill_session(worker)
        self._redis.stop()


def measure(rollouts: int, rounds: int) -> dict[str, list[Sample]]:
    """Measure everything ``rounds`` times, in turn."""
    ours = [["-A", "workers.gpu", "worker"]] * WORKERS
    theirs = [["-A", "benchmarks.plain", "worker", "--concurrency", str(WORKERS)]]
    samples: dict[str, list[Sample]] = {name: [] for name in (PLAIN, *map(_road, GROUP_SIZES))}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gym-queue-bench-")))
        plain = Side("plain", folder, theirs, "PLAIN_REDIS_URL")
        road = Side("road", folder, ours, "GYM_QUEUE_REDIS_URL")
        for side in (plain, road):
            stack.callback(side.stop)
            side.start()
        for number in range(1, rounds + 1):
            _say(f"round {number} of {rounds}")
            samples[PLAIN].append(plain.measure("benchmarks.plain", "--tasks", rollouts))
            for size in GROUP_SIZES:
                options = ("--rollouts", rollouts // size * size, "--samples", size)
                samples[_road(size)].append(road.measure("benchmarks.road", *options))
    return samples


def _road(size: int) -> str:
    return f"road, groups of {size}"


def ratios(samples: dict[str, list[Sample]]) -> dict[int, list[float]]:
    """Return, by group size and round, how many times the rate of plain Celery the road reached."""
    return {
        size: [
            ours["rate"] / theirs["rate"]
            for ours, theirs in zip(samples[_road(size)], samples[PLAIN], strict=True)
        ]
        for size in GROUP_SIZES
    }


def _spread(values: Sequence[float], form: str = ",.0f") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(samples: dict[str, list[Sample]]) -> str:
    """Return the table: a column a contender, a row a quantity."""
    rows = [
        ["", *samples],
        ["per second", *(_spread([s["rate"] for s in all_]) for all_ in samples.values())],
    ]
    for key, unit in (("cpu", "CPU-µs each"), ("memory", "peak MB")):
        names = dict.fromkeys(name for all_ in samples.values() for name in all_[0][key])
        for name in names:
            cells = [
                _spread([s[key][name] for s in all_]) if name in all_[0][key] else ""
                for all_ in samples.values()
            ]
            rows.append([f"{unit}: {name}", *cells])
        if key == "cpu":
            totals = [_spread([sum(s["cpu"].values()) for s in all_]) for all_ in samples.values()]
            rows.append([f"{unit}: total", *totals])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rollouts", type=int, default=5000, help="rollouts, and tasks, in each measurement")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    options = parser.parse_args()
    if options.rollouts < max(GROUP_SIZES) or options.rounds < 1:
        parser.error(f"at least {max(GROUP_SIZES)} rollouts and one round")
    return options


def main() -> None:
    """Measure, and print the table and the ratios."""
    options = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is taken down
    machine: Machine = describe_machine()
    samples = measure(options.rollouts, options.rounds)
    print(
        f"{options.rollouts} no-op rollouts, {WORKERS} worker processes, {options.rounds} rounds on {machine}"
    )
    print(f"Median (least to most) over the rounds; memory is of the largest worker\n\n{table(samples)}\n")
    found = ratios(samples)
    print(
        "; ".join(
            f"groups of {size}: {_spread(values, '.2f')} times plain Celery (wanted: {TARGETS[size]})"
            for size, values in found.items()
        )
    )
    if options.json:
        report = {"machine": machine.as_dict(), "options": {"rollouts": options.rollouts}, "samples": samples}
        options.json.write_text(json.dumps(report | {"ratios": found}, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
