"""The road itself: the real coordinator with a run of no-op rollouts, in a process of its own.

The workers run already. Prints what the run cost, as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.metering import Meter
from benchmarks.processes import cpu_seconds, own_peak_megabytes, peak_megabytes
from gym_queue import assembly
from gym_queue.coordinator.archive import Archive
from gym_queue.coordinator.metrics import Metrics
from gym_queue.coordinator.run import Coordinator
from gym_queue.coordinator.source import JsonlSource
from gym_queue.maintenance.cancel import cancel_run
from gym_queue.records import RunSpec
from gym_queue.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gym_queue.celery_app import CeleryBroker
    from gym_queue.ledger.base import Ledger

_PARTS = {"Feeder.run": "feeder", "Aggregator.run": "aggregator"}


class Road:
    """Sends runs over the road.

    Args:
        settings: of the stack that is up.
        folder: where input and output go.
        samples: rollouts an example: the size of a group.
    """

    def __init__(self, settings: Settings, folder: Path, samples: int) -> None:
        self._settings = settings
        self._folder = folder
        self._samples = samples
        self._ledger: Ledger = assembly.make_ledger(settings)
        self._broker: CeleryBroker = assembly.make_broker(settings)

    async def run(self, name: str, rollouts: int) -> float:
        """Run to the end, the sorted and durable output; return how many seconds that took."""
        rows = self._folder / f"{name}.input.jsonl"
        with rows.open("w") as file:
            for number in range(rollouts // self._samples):
                file.write(json.dumps({"id": str(number), "prompt": "What is 6 * 7?", "answer": "ok"}) + "\n")
        source = JsonlSource(
            rows, default_environment="rows", environments=assembly.make_environment, limit=None
        )
        metrics, run_id = Metrics(self._samples), f"{name}-{time.time_ns()}"
        with Archive(self._folder / f"{name}.jsonl", self._samples).open() as archive:
            coordinator = Coordinator(
                ledger=self._ledger,
                publisher=self._broker,
                spec=RunSpec(run_id=run_id, model="stub:", samples=self._samples),
                source=source,
                archive=archive,
                metrics=metrics,
                window=self._settings.window,
                on_progress=lambda _: None,
                cancel=partial(cancel_run, self._ledger, run_id, "the run was cancelled"),
            )
            started = time.perf_counter()
            result = await coordinator.run()
            archive.finalize()
            seconds = time.perf_counter() - started
        if result.rollouts.succeeded != rollouts or result.reward.mean != 1.0:
            msg = f"{rollouts} rollouts went out and came back as {result.rollouts}"
            raise RuntimeError(msg)
        return seconds

    async def close(self) -> None:
        """Close the connections."""
        await self._broker.close()
        await self._ledger.close()


def _publisher_seconds() -> float:
    """Return the CPU time of the thread that sends tickets: the feeder's, for nobody else sends here."""
    return sum(
        time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        for thread in threading.enumerate()
        if thread.name.startswith("publisher") and thread.ident
    )


async def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run twice, a little to warm up and then in earnest; return rate, CPU-µs a rollout and peak memory."""
    meter = Meter(_PARTS)
    meter.install(asyncio.get_running_loop())
    road = Road(Settings(), folder, options.samples)
    processes: Mapping[str, Sequence[int]] = {"workers": options.worker_pids, "redis": [options.redis_pid]}
    try:
        await road.run("warm-up", options.warm_up)
        before = {name: sum(map(cpu_seconds, pids)) for name, pids in processes.items()}
        parts, publisher, own = dict(meter.seconds), _publisher_seconds(), time.process_time()
        seconds = await road.run("measured", options.rollouts)
        own = time.process_time() - own
        cpu = {name: sum(map(cpu_seconds, pids)) - before[name] for name, pids in processes.items()}
        for part in _PARTS.values():
            cpu[part] = meter.seconds[part] - parts.get(part, 0.0)
        cpu["feeder"] += _publisher_seconds() - publisher
    finally:
        await road.close()
    cpu["event loop"] = own - cpu["feeder"] - cpu["aggregator"]
    memory = {name: max(map(peak_megabytes, pids)) for name, pids in processes.items()}
    return {
        "rate": options.rollouts / seconds,
        "cpu": {name: 1e6 * spent / options.rollouts for name, spent in cpu.items()},
        "memory": memory | {"coordinator": own_peak_megabytes()},
    }


def main() -> None:
    """Measure one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--warm-up", type=int, default=400)
    parser.add_argument("--redis-pid", type=int, required=True)
    parser.add_argument("--worker-pids", type=int, nargs="+", required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gym-queue-bench-") as folder:
        print(json.dumps(asyncio.run(measure(options, Path(folder)))))


if __name__ == "__main__":
    main()
