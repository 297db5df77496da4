"""The parts of the benchmark: each measures one thing, round by round, and returns its samples by name."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.contenders import PEERS, TASKS, WORKERS, road
from benchmarks.simulation import simulate
from benchmarks.stand import Contender, Stand
from benchmarks.virtualenvs import NotInstalledError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.measurement import Sample

_WORLDS = "python:benchmarks.worlds:"
_SLOTS = 256
"""Rollouts that one worker holds, by default."""

_FLOOD = 4000
"""Rollouts of some seconds, at the least, during which a head's answers are measured."""

GROUP_SIZES = (1, 8, 64)
VERIFIERS = (0.0001, 0.005, 0.05)


@dataclass
class Plan:
    """What was asked for. ``rollouts`` is what a no-op run takes; ``probes`` are single ones."""

    rounds: int
    rollouts: int
    peers: Sequence[str]
    sleeps: Sequence[Sleep]
    curve: Sequence[int]
    probes: int


@dataclass(frozen=True)
class Sleep:
    """Sleeping rollouts: their ``mean`` in seconds, how many at once in one worker, how many in all."""

    mean: float
    at_once: int
    rollouts: int
    rounds: int


@dataclass
class Results:
    """Samples by name; ``missing`` says why a contender has none."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, sample: Sample) -> None:
        """Take in a sample, and say that it is there."""
        self.samples.setdefault(name, []).append(sample)
        rate = f" {sample['rate']:,.0f}/s" if "rate" in sample else ""
        say(f"  {name}{rate}")

    def add_drain(self, number: int, name: str, sample: Sample) -> None:
        """Take in how fast the queue was drained, beside what else was found in that round (from 0 on)."""
        self.samples[name][number] |= sample
        say(f"  {name} {sample['drain']:,.0f}/s")


def say(text: str) -> None:
    """Tell who watches what is under way."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _stand(contender: Contender) -> Iterator[Stand]:
    with tempfile.TemporaryDirectory(prefix="gq-bench-") as folder, Stand(contender, Path(folder)) as stand:
        yield stand


def noop(plan: Plan) -> Results:
    """No-op rollouts at each group size beside the no-op tasks of the peers, in turn within each round."""
    results = Results()
    with ExitStack() as stack:
        stands = {}
        for name in plan.peers:
            try:
                stands[name] = stack.enter_context(_stand(PEERS[name]()))
            except NotInstalledError as error:
                results.missing[name] = f"not installed: {error}"
                say(f"  {name} {results.missing[name]}")
        ours = stack.enter_context(_stand(road()))
        for number in range(plan.rounds):
            say(f"no-op, round {number + 1} of {plan.rounds}")
            _in_turn(plan, results, stands, ours, results.add)
        for number in range(plan.rounds):  # later: full queues leave Redis larger than it was
            say(f"no-op from full queues, round {number + 1} of {plan.rounds}")
            full = {name: stand for name, stand in stands.items() if stand.contender.drains}
            _in_turn(plan, results, full, ours, partial(results.add_drain, number), "--drain")
    return results


def _in_turn(
    plan: Plan,
    results: Results,
    stands: dict[str, Stand],
    ours: Stand,
    add: Callable[[str, Sample], None],
    *more: str,
) -> None:
    """Measure each peer once, and the road at each group size. Who fails takes no further part."""
    for name, stand in list(stands.items()):
        tasks = min(plan.rollouts, TASKS.get(name, plan.rollouts))
        try:
            add(name, stand.measure("--tasks", tasks, *more))
        except (RuntimeError, AssertionError, TimeoutError) as error:
            results.missing[name] = f"failed: {error}"
            say(f"  {name} {results.missing[name]}")
            del stands[name]
    for size in GROUP_SIZES:
        tasks = plan.rollouts // size * size
        add(f"road, groups of {size}", ours.measure("--tasks", tasks, "--samples", size, *more))


def work(plan: Plan) -> Results:
    """Rollouts with something to carry: large trajectories, several turns, a verifier in the second queue."""
    results = Results()
    cases: dict[str, tuple[int, str, int]] = {
        "trajectories of 4 KiB": (plan.rollouts // 2, f"{_WORLDS}Quick?padding=4096", 512),
        "trajectories of 256 KiB": (max(64, plan.rollouts // 40), f"{_WORLDS}Quick?padding=262144", 64),
        "5 turns": (plan.rollouts // 2, f"{_WORLDS}Quick?turns=5", 512),
    }
    for seconds in VERIFIERS:
        rollouts = int(min(plan.rollouts // 4, 2.0 * WORKERS / seconds))
        cases[f"verifier of {1000 * seconds:g} ms"] = (rollouts, f"{_WORLDS}Queued?seconds={seconds}", 64)
    with _stand(road(verifiers=WORKERS)) as stand:
        for number in range(plan.rounds):
            say(f"work, round {number + 1} of {plan.rounds}")
            for name, (rollouts, environment, warm_up) in cases.items():
                counts = ("--tasks", rollouts // 8 * 8, "--samples", 8, "--warm-up", warm_up)
                arguments = (*counts, "--environment", environment)
                results.add(name, stand.measure(*arguments))
                results.add_drain(number, name, stand.measure(*arguments, "--drain"))
    return results


def sleeping(plan: Plan) -> Results:
    """Rollouts that take their time, with a long tail, in one worker process."""
    results = Results()
    for sleep in plan.sleeps:
        one = Contender(
            name="road",
            client=["-m", "benchmarks.road"],
            workers=road().workers[:1],
            variables={"GYM_QUEUE_CONCURRENCY": str(sleep.at_once)},
            ours=True,
        )
        with _stand(one) as stand:
            for number in range(1, sleep.rounds + 1):
                say(f"sleeping {sleep.mean:g} s, round {number} of {sleep.rounds}")
                environment = f"{_WORLDS}Sleeping?mean={sleep.mean}"
                arguments = ("--tasks", sleep.rollouts, "--samples", 8, "--slots", sleep.at_once)
                name = f"mean {sleep.mean:g} s, {sleep.at_once:,} at once, {sleep.rollouts:,} in all"
                warm = ("--warm-up", 8, "--sleeping", "--environment", environment)
                results.add(name, stand.measure(*arguments, *warm))
    return results


def latency(plan: Plan) -> Results:
    """How long one rollout waits on an idle stack, and beside a flood of no-op rollouts."""
    results = Results()
    with _stand(road()) as stand:
        for number in range(1, plan.rounds + 1):
            say(f"latency, round {number} of {plan.rounds}")
            results.add("idle", stand.measure("--probe", "latency", "--tasks", plan.probes))
            flood = ("--flood", 8 * plan.rollouts, "--samples", 8)
            results.add("loaded", stand.measure("--probe", "latency", "--tasks", plan.probes, *flood))
    return results


def service(plan: Plan) -> Results:
    """What a client of a head waits for: on an idle stack, and while about 1,000 rollouts end in a second."""
    results = Results()
    head = Contender("head", ["-m", "benchmarks.service"], road().workers, ours=True, head=True)
    with _stand(head) as stand:
        for number in range(1, plan.rounds + 1):
            say(f"service, round {number} of {plan.rounds}")
            found = stand.measure("--tasks", plan.probes, "--flood", max(_FLOOD, plan.rollouts))
            for name, sample in found.items():
                results.add(name, sample)
    return results


def footprint(plan: Plan) -> Results:
    """What a rollout of a 1 KiB example takes in Redis, and how often a worker asks the ledger."""
    results = Results()
    rollouts = min(4096, plan.rollouts) // 64 * 64
    trips = Contender("round trips", ["-m", "benchmarks.round_trips"])
    with _stand(road(GYM_QUEUE_CONCURRENCY=str(rollouts))) as stand, _stand(trips) as alone:
        for number in range(1, plan.rounds + 1):
            say(f"footprint, round {number} of {plan.rounds}")
            for size in GROUP_SIZES:
                arguments = ("--probe", "footprint", "--tasks", rollouts, "--samples", size)
                gate = stand.folder / f"gate-{number}-{size}"
                example = ("--padding", 1024, "--gate", gate, "--environment", f"{_WORLDS}Gated?gate={gate}")
                sample = stand.measure(*arguments, *example)
                sample["round_trips"] = alone.measure("--tasks", 64, "--samples", size)
                results.add(f"groups of {size}", sample)
    return results


def curve(plan: Plan) -> Results:
    """What a rollout costs in runs of each size, one run each."""
    results = Results()
    for size in plan.curve:
        say(f"a run of {size:,}")
        with _stand(road()) as stand:
            results.add(f"{size:,} rollouts", stand.measure("--tasks", size, "--samples", 8))
    return results


def start(plan: Plan) -> Results:
    """How long the command takes to show its help, and to bring up a stack, run 8 rollouts and end."""
    results = Results()
    for number in range(1, plan.rounds + 1):
        say(f"start, round {number} of {plan.rounds}")
        command = [sys.executable, "-m", "gym_queue.cli.submit"]
        results.add("submit-rollouts --help", {"seconds": _time([*command, "--help"])})
        with tempfile.TemporaryDirectory(prefix="gq-bench-") as folder:
            rows, out = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
            rows.write_text('{"id": "1", "prompt": "What is 6 * 7?", "answer": "ok"}\n')
            run = [*command, str(rows), "--model", "stub:", "--samples", "8", "-o", str(out)]
            began = time.time()
            whole = _time(run)
            first = out.stat().st_mtime - began
        results.add("the embedded stack", {"seconds": whole, "first_row": first})
    return results


def _time(command: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - a command of our own making
    return time.perf_counter() - started


def scale(plan: Plan) -> Results:
    """SIMULATED: more workers than there are cores, from what each part of the road was measured to take."""
    results = Results()
    with _stand(road()) as stand:
        for number in range(1, plan.rounds + 1):
            say(f"scale, round {number} of {plan.rounds}")
            for size in (1, 8):
                arguments = ("--tasks", plan.rollouts // size * size, "--samples", size)
                each = stand.measure(*arguments)["cpu"]
                for workers in (1, 2, 4, 8, 16):
                    name = f"groups of {size}, {workers} workers"
                    results.add(name, simulate(each, size, workers))
    return results


PARTS = {
    "noop": noop,
    "work": work,
    "sleeping": sleeping,
    "latency": latency,
    "service": service,
    "footprint": footprint,
    "curve": curve,
    "scale": scale,
    "start": start,
}


def median(samples: Sequence[Sample], *path: str) -> float | None:
    """Return the median over the rounds of what lies at ``path``; ``None`` where it is nowhere."""
    values = [value for sample in samples if (value := look(sample, path)) is not None]
    return statistics.median(values) if values else None


def look(sample: Sample, path: Sequence[str]) -> float | None:
    """Return what lies at ``path`` in a sample. ``*`` sums what lies there."""
    found: object = sample
    for part in path:
        if not isinstance(found, dict):
            return None
        found = sum(found.values()) if part == "*" else found.get(part)
    return float(found) if isinstance(found, int | float) else None
