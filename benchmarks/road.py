"""The road itself: the real coordinator with a run, in a process of its own. The workers run already.

Prints what the run cost, as JSON: a ``measurement.Sample``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import probes
from benchmarks.measurement import Stage, add_arguments, costs, in_all, memory
from benchmarks.metering import Meter, publisher_seconds
from gym_queue import assembly
from gym_queue.coordinator.archive import Archive
from gym_queue.coordinator.metrics import Metrics
from gym_queue.coordinator.run import Coordinator
from gym_queue.coordinator.source import JsonlSource
from gym_queue.maintenance.cancel import cancel_run
from gym_queue.records import Limits, RunSpec
from gym_queue.records import Stage as Hop
from gym_queue.settings import Settings

if TYPE_CHECKING:
    from benchmarks.measurement import Sample
    from gym_queue.celery_app import CeleryBroker
    from gym_queue.ledger.base import Ledger
    from gym_queue.records import Summary

_PARTS = {"Feeder.run": "feeder", "Aggregator.run": "aggregator"}
_GLANCE = 0.01
_A_FEW_BATCHES = 5000
"""Rows."""

_PATIENT = Limits(generate_timeout=3600, tool_timeout=3600, rollout_timeout=7200)


class Seen(Metrics):
    """Metrics that note when rollouts could be seen: their rows are on the disk by then.

    Args:
        samples: rollouts of each example.
        rollouts: how many there will be.
        keep: keep them all. A long run does not: what it measures is the coordinator's memory, not this.
    """

    def __init__(self, samples: int, rollouts: int, *, keep: bool) -> None:
        super().__init__(samples)
        self.seen: list[tuple[float, Summary]] = []
        self._keep = keep
        self._count = 0
        self._tenth = tenth = rollouts // 10
        self._passed = dict.fromkeys((1, tenth + 1, rollouts - tenth + 1, rollouts), 0.0)

    def add(self, summary: Summary) -> None:
        """See ``Metrics.add``."""
        super().add(summary)
        self._count += 1
        if self._keep:
            self.seen.append((time.time(), summary))
        if self._count in self._passed:
            self._passed[self._count] = time.time()

    def tenths(self) -> Sample:
        """Return the throughput of the first and last tenth of a run that is long enough."""
        if self._tenth < _A_FEW_BATCHES:
            return {}
        start, first, last, end = self._passed.values()
        return {"first_tenth": self._tenth / (first - start), "last_tenth": self._tenth / (end - last)}


class Road:
    """Sends runs over the road.

    Args:
        settings: of the stack that is up.
        folder: where input and output go.
        samples: rollouts an example: the size of a group.
        environment: of all examples.
        padding: characters of each prompt.
        keep: whether the summaries of a run are kept until its end.

    Attributes:
        submitted_at: when the newest run's input had been checked and its output opened (Unix time).
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        samples: int,
        environment: str = "rows",
        padding: int = 0,
        *,
        keep: bool = False,
    ) -> None:
        self.settings = settings
        self.ledger: Ledger = assembly.make_ledger(settings)
        self.broker: CeleryBroker = assembly.make_broker(settings)
        self.samples = samples
        self.folder = folder
        self._environment = environment
        self._prompt = "What is 6 * 7?".ljust(padding, "?")
        self._keep = keep
        self._runs = 0
        self.submitted_at = 0.0

    async def run(self, rollouts: int, *, window: int | None = None, priority: int = 0) -> tuple[float, Seen]:
        """Run to the end, the sorted and durable output. Returns how many seconds that took, and what was
        seen.
        """
        self._runs += 1
        name = f"run{self._runs}"
        rows = self.folder / f"{name}.input.jsonl"
        with rows.open("w") as file:
            for number in range(rollouts // self.samples):
                file.write(json.dumps({"id": str(number), "prompt": self._prompt, "answer": "ok"}) + "\n")
        source = JsonlSource(
            rows, default_environment=self._environment, environments=assembly.make_environment, limit=None
        )
        metrics, run_id = Seen(self.samples, rollouts, keep=self._keep), f"{name}-{time.time_ns()}"
        with Archive(self.folder / f"{name}.jsonl", self.samples).open() as archive:
            coordinator = Coordinator(
                ledger=self.ledger,
                publisher=self.broker,
                spec=RunSpec(
                    run_id=run_id, model="stub:", samples=self.samples, limits=_PATIENT, priority=priority
                ),
                source=source,
                archive=archive,
                metrics=metrics,
                window=window or self.settings.window,
                on_progress=lambda _: None,
                cancel=partial(cancel_run, self.ledger, run_id, "the run was cancelled"),
            )
            self.submitted_at, started = time.time(), time.perf_counter()
            result = await coordinator.run()
            archive.finalize()
            seconds = time.perf_counter() - started
        for path in self.folder.glob(f"{name}.*jsonl"):
            path.unlink()
        if result.rollouts.succeeded != rollouts or result.reward.mean != 1.0:
            msg = f"{rollouts} rollouts went out and came back as {result.rollouts}"
            raise RuntimeError(msg)
        return seconds, metrics

    async def accepted(self) -> int:
        """Return how many rollouts of all runs the ledger has accepted."""
        return sum(run.accepted for run in await self.ledger.runs())

    async def close(self) -> None:
        """Close the connections."""
        await self.broker.close()
        await self.ledger.close()


async def measure(options: argparse.Namespace, road: Road, stage: Stage) -> Sample:
    """Run a little to warm up, then in earnest."""
    meter = Meter(_PARTS)
    meter.install(asyncio.get_running_loop())
    await road.run(options.warm_up)
    if options.drain:
        return {"drain": await drain(options, road, stage)}
    parts, publisher = dict(meter.seconds), publisher_seconds()
    with costs(stage) as spent:
        seconds, metrics = await road.run(options.tasks)
    for part in _PARTS.values():
        spent.cpu[part] = meter.seconds[part] - parts.get(part, 0.0)
    spent.cpu["feeder"] += publisher_seconds() - publisher
    spent.cpu["event loop"] = spent.cpu.pop("client") - spent.cpu["feeder"] - spent.cpu["aggregator"]
    sample: Sample = {
        "rate": options.tasks / seconds,
        **spent.each(options.tasks),
        "in_all": in_all(stage),
    }
    sample |= metrics.tenths()
    if options.sleeping:
        sample |= _makespan(options, seconds, metrics)
    return sample | {"memory": memory(stage)}


async def drain(options: argparse.Namespace, road: Road, stage: Stage) -> float:
    """Fill the queue while the workers stand still; return how many rollouts a second they then do, to rows
    on the disk.
    """
    stage.signal(signal.SIGSTOP)
    try:
        run = asyncio.create_task(road.run(options.tasks, window=2 * options.tasks))
        tickets = options.tasks // road.samples
        while (
            await road.accepted() < options.tasks or await road.broker.depth(Hop.GENERATE) < tickets - 2
        ):  # the workers' own pops, which are under way, take some
            await asyncio.sleep(_GLANCE)
            if run.done():
                run.result()
    finally:
        stage.signal(signal.SIGCONT)
    started = time.perf_counter()
    await run
    return float(options.tasks / (time.perf_counter() - started))


def _makespan(options: argparse.Namespace, seconds: float, metrics: Seen) -> Sample:
    """Compare with workers that cost nothing: each slot takes the next rollout the moment it is free."""
    slots = options.slots
    slept = sorted(((s.example_index, s.sample_index), s.metrics["slept"]) for _, s in metrics.seen)
    ideal = probes.ideal([duration for _, duration in slept], slots)
    return {"makespan": seconds, "ideal": ideal, "over_ideal": seconds / ideal}


async def _main(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    stage = Stage.parse(options)
    keep = options.sleeping or options.probe is not None
    road = Road(Settings(), folder, options.samples, options.environment, options.padding, keep=keep)
    try:
        if options.probe == "latency":
            return await probes.latency(road, options.tasks, options.flood)
        if options.probe == "footprint":
            return await probes.footprint(road, options.tasks, stage, options.gate)
        return await measure(options, road, stage)
    finally:
        await road.close()


def main() -> None:
    """Measure one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, required=True, help="rollouts")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--environment", default="rows")
    parser.add_argument("--padding", type=int, default=0)
    parser.add_argument("--warm-up", type=int, default=512)
    parser.add_argument("--sleeping", action="store_true", help="compare the makespan with the ideal")
    parser.add_argument("--slots", type=int, default=512, help="how many rollouts all workers hold at once")
    parser.add_argument("--probe", choices=["latency", "footprint"])
    parser.add_argument("--flood", type=int, default=0, help="rollouts that keep the workers busy meanwhile")
    parser.add_argument("--gate", type=Path, help="the file that lets gated rollouts end")
    add_arguments(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gym-queue-bench-") as folder:
        print(json.dumps(asyncio.run(_main(options, Path(folder)))))


if __name__ == "__main__":
    main()
