"""How quickly a head answers while it leads a run whose rollouts end by the thousand.

    python -m benchmarks.head [--rollouts N] [--rounds N]

A head, two workers and a Redis; rollouts that sleep, so that about 1,000 end in a second; and one client that
asks ``GET /v1/runs/{id}`` every 10 ms. Each round is a run of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import aiohttp

from benchmarks.machine import describe_machine
from benchmarks.stand import ROOT, Contender, Stand
from gym_queue import AsyncClient
from gym_queue.embedded.children import kill_session, spawn

PORT = 21990
SAMPLES = 8
SLEEP = 0.45
"""Seconds that a rollout takes: 512 slots then end some 1,000 a second."""

_PAUSE = 0.01
_WORKER = ("-m", "celery", "--quiet", "-A", "workers.gpu", "worker", "-n", "gpu%number@%h")


class Round(NamedTuple):
    """Rollouts that ended in a second, and how long answers took, in milliseconds."""

    rate: float
    p50: float
    p99: float


async def measure(url: str, rollouts: int) -> Round:
    """Run, and ask how the run stands until it has ended."""
    async with AsyncClient(url, "") as client, aiohttp.ClientSession(url) as http:
        run = await client.submit(
            model=f"stub:?delay={SLEEP}",
            samples=SAMPLES,
            examples=[{"prompt": "What is 6 * 7?", "answer": "ok"}] * (rollouts // SAMPLES),
        )
        await run.flush()
        took: list[float] = []
        started = 0.0
        while True:
            asked = time.perf_counter()
            async with http.get(f"/v1/runs/{run.run_id}") as answer:
                view = await answer.json()
            if view["state"] == "ended":
                break
            if view["succeeded"]:
                started = started or asked
                took.append(1000 * (time.perf_counter() - asked))
            await asyncio.sleep(_PAUSE)
        rate = rollouts / (time.perf_counter() - started)
    cuts = statistics.quantiles(took, n=100)
    return Round(rate, statistics.median(took), cuts[98])


def main() -> None:
    """Measure and print a line a round, then the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rollouts", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gym-queue-bench-") as name:
        folder = Path(name)
        contender = Contender("head", client=(), workers=[_WORKER] * 2, ours=True)
        with Stand(contender, folder) as stand:
            variables = stand.variables | {
                "GYM_QUEUE_RUNS_DIR": str(folder / "runs"),
                "GYM_QUEUE_RATE_LIMIT": "0",
                "GYM_QUEUE_AUTH_TOKEN": "",
            }
            command = [sys.executable, "-m", "gym_queue.cli.main", "head", "--port", str(PORT)]
            head = spawn(command, folder / "head.log", environment=variables, cwd=ROOT)
            try:
                url = f"http://127.0.0.1:{PORT}"
                rounds = [asyncio.run(measure(url, options.rollouts)) for _ in range(options.rounds)]
            finally:
                kill_session(head)
    print(f"GET /v1/runs/ID while rollouts end, on {describe_machine()}")
    for one in rounds:
        print(f"{one.rate:,.0f} rollouts/s: p50 {one.p50:.1f} ms, p99 {one.p99:.1f} ms")
    print(f"median p99: {statistics.median(one.p99 for one in rounds):.1f} ms")


if __name__ == "__main__":
    main()
