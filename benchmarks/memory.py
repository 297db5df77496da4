"""What a long run costs in memory: the same command for few and for many no-op rollouts.

Prints the peaks of Redis (``used_memory_peak``) and of the coordinating process (VmHWM) for each size, and
how much the largest run takes of what the smallest does. It should take no more than 1.3 times as much.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import redis

from benchmarks.processes import describe_machine, peak_of
from gym_queue.embedded.redis import RedisServer

SAMPLES = 8
WORKERS = 2
TARGET = 1.3
_GLANCE = 0.2


def measure(rollouts: int, folder: Path) -> dict[str, float]:
    """Run ``submit-rollouts`` on a Redis of its own. Returns seconds, and MB of Redis and the coordinator."""
    rows, out = folder / "in.jsonl", folder / "out.jsonl"
    with rows.open("w") as file:
        for number in range(rollouts // SAMPLES):
            file.write(json.dumps({"id": str(number), "prompt": "What is 6 * 7?", "answer": "ok"}) + "\n")
    command = [sys.executable, "-m", "gym_queue.cli.submit", str(rows), "--model", "stub:"]
    command += ["--samples", str(SAMPLES), "--workers", str(WORKERS), "-o", str(out)]
    with RedisServer(folder / "redis") as server, redis.Redis.from_url(server.url) as client:
        started = time.monotonic()
        process = subprocess.Popen(  # noqa: S603 - a command of our own making
            command,
            env=os.environ | {"GYM_QUEUE_REDIS_URL": server.url},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        peak = 0.0
        try:
            while process.poll() is None:
                peak = max(peak, peak_of(process.pid))
                time.sleep(_GLANCE)
        finally:
            process.terminate()
            process.wait()
        seconds = time.monotonic() - started
        info: dict[str, Any] = client.info("memory")
    written = sum(1 for _ in out.open("rb"))
    if process.returncode or written != rollouts // SAMPLES * SAMPLES:
        sys.exit(f"{' '.join(command)} ended with status {process.returncode} and {written} rows")
    return {"seconds": seconds, "redis": info["used_memory_peak"] / 1e6, "coordinator": peak}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rollouts", type=int, nargs="+", default=[10_000, 1_000_000], help="sizes of runs")
    sizes = sorted(parser.parse_args().rollouts)
    print(f"No-op rollouts, groups of {SAMPLES}, {WORKERS} workers, on {describe_machine()}")
    print(f"{'rollouts':>10}  {'seconds':>8}  {'Redis MB':>9}  {'coordinator MB':>15}")
    found = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="gym-queue-") as folder:
            found.append(measure(size, Path(folder)))
        last = found[-1]
        print(
            f"{size:>10,}  {last['seconds']:>8.1f}  {last['redis']:>9.1f}  {last['coordinator']:>15.1f}",
            flush=True,
        )
    first, last = found[0], found[-1]
    grown = ", ".join(f"{name} {last[name] / first[name]:.2f} times" for name in ("redis", "coordinator"))
    print(f"From {sizes[0]:,} to {sizes[-1]:,} rollouts: {grown} (wanted: at most {TARGET})")


if __name__ == "__main__":
    main()
