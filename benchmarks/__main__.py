"""The benchmark: what the road costs, beside its peers, in one run on one machine.

    python -m benchmarks [PART...] [--quick] [--rounds N] [--rollouts N] [--peer NAME...] ...

Every contender gets a redis-server of its own, of the same binary and settings (append-only file, unix
socket), and two worker processes. Peers live in virtualenvs of their own, which are made at the first run.
Each round measures all contenders in turn, each from a fresh client process, so that what else the machine
does falls on all alike. Shown are medians over the rounds, with the least and the most in parentheses; the
samples themselves are kept under ``runs/bench/``. ``docs/explanation/performance.md`` says what each means.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.contenders import LARGE, PEERS
from benchmarks.machine import describe_machine
from benchmarks.parts import PARTS, Plan, Results, Sleep, say
from benchmarks.report import table, verdicts

if TYPE_CHECKING:
    from collections.abc import Sequence

_SLEEPS = {
    False: (Sleep(0.5, 256, 2048, 3), Sleep(5.0, 2000, 6000, 1), Sleep(30.0, 10_000, 20_000, 1)),
    True: (Sleep(0.5, 256, 1024, 1), Sleep(5.0, 2000, 4000, 1)),
}
_CURVE = {False: (1000, 10_000, 100_000, 1_000_000), True: (1000, 10_000)}


def _parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Plan]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them if none"
    )
    parser.add_argument("--quick", action="store_true", help="fewer of everything: about three minutes")
    parser.add_argument("--rounds", type=int, help="how often each is measured (3; quick: 1)")
    parser.add_argument("--rollouts", type=int, help="rollouts of a no-op run (10000; quick: 2000)")
    parser.add_argument("--peer", action="append", choices=PEERS, help="only this one; may be repeated")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--curve", type=int, nargs="+", metavar="ROLLOUTS", help="sizes of the long runs")
    parser.add_argument("--sleep-scale", type=float, default=1.0, help="scales what the sleeping ones take")
    parser.add_argument("--json", type=Path, help="where the samples go (runs/bench/TIME.json)")
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    peers = options.peer or [name for name in PEERS if name not in LARGE or not options.quick]
    quick, scale = options.quick, options.sleep_scale
    plan = Plan(
        rounds=options.rounds or (1 if quick else 3),
        rollouts=options.rollouts or (2000 if quick else 10_000),
        peers=[] if options.no_peers else peers,
        sleeps=[Sleep(s.mean * scale, s.at_once, s.rollouts, s.rounds) for s in _SLEEPS[quick]],
        curve=options.curve or _CURVE[quick],
        probes=40 if quick else 100,
    )
    return options, plan


def main() -> None:
    """Measure, print the tables, and keep the samples."""
    options, plan = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is taken down
    machine, began = describe_machine(), time.strftime("%Y%m%d-%H%M%S")
    results: dict[str, Results] = {}
    for part in options.parts or PARTS:
        started = time.monotonic()
        results[part] = PARTS[part](plan)
        say(f"{part} took {time.monotonic() - started:.0f} s\n")
    print(f"On {machine}.\nMedians of {plan.rounds} rounds (least-most), each rollout or task.")
    for part, found in results.items():
        print(f"\n{part}: {(PARTS[part].__doc__ or '').strip()}\n\n{table(part, found)}")
    print()
    for line in verdicts(results):
        print(line)
    path = options.json or Path("runs/bench") / f"{began}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine.as_dict(),
        "began": began,
        "plan": asdict(plan),
        "results": {part: asdict(found) for part, found in results.items()},
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nAll samples: {path}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
