"""Looks at single rollouts, and at Redis while nothing moves: latencies and bytes; and the ideal."""

from __future__ import annotations

import asyncio
import heapq
import signal
import statistics
from typing import TYPE_CHECKING, Any

import redis.asyncio as aioredis

from gym_queue.records import Stage as Hop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from benchmarks.measurement import Sample, Stage
    from benchmarks.road import Road, Seen

_GLANCE = 0.005


def ideal(durations: Sequence[float], slots: int) -> float:
    """Return the makespan of rollouts that cost nothing but their time, in order, ``slots`` at once."""
    free = [0.0] * min(slots, len(durations))
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50 and p99, in ms."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": 1e3 * cuts[49], "p99": 1e3 * cuts[98]}


async def latency(road: Road, probes: int, flood: int) -> Sample:
    """Submit single rollouts one after the other; how long until each starts, and from its end until it is
    seen? With runs of ``flood`` rollouts meanwhile, one after the other; the probes have the higher priority.

    ``submit_start``: from before the run is opened to its claim. ``accept_start``: from its acceptance to
    its claim. ``end_seen``: from the end of its verifier to its row on the disk.
    """
    probed = asyncio.Event()
    busy = asyncio.create_task(_flood(road, flood, probed)) if flood else None
    found: dict[str, list[float]] = {"submit_start": [], "accept_start": [], "end_seen": []}
    folder = road.folder / "probes"
    folder.mkdir()
    small = type(road)(road.settings, folder, 1, keep=True)
    try:
        await small.run(1)
        for _ in range(probes):
            if busy is not None and busy.done():
                busy.result()
            _, metrics = await small.run(1, priority=1)
            ((seen, summary),) = metrics.seen
            timings = summary.timings
            waited = timings.queued or 0.0
            found["submit_start"].append(timings.accepted_at + waited - small.submitted_at)
            found["accept_start"].append(waited)
            found["end_seen"].append(seen - timings.ended_at)
    finally:
        probed.set()
        await small.close()
    sample: Sample = {name: percentiles(values) for name, values in found.items()}
    if busy is not None:
        sample["end_seen_of_the_flood"] = percentiles(await busy)
    return sample


async def _flood(road: Road, rollouts: int, probed: asyncio.Event) -> list[float]:
    """Send runs until the probes are done; return how long each rollout waited from its end to its row."""
    waited: list[float] = []
    while not probed.is_set():
        _, metrics = await road.run(rollouts)
        waited += [at - summary.timings.ended_at for at, summary in metrics.seen]
    return waited


async def footprint(road: Road, rollouts: int, stage: Stage, gate: Path) -> Sample:
    """Return the bytes that Redis holds of a rollout that waits for a worker, and of one in its hands.

    The environment is ``worlds.Gated``: what is in flight is looked at while nothing can end.
    """
    gate.touch()  # noqa: ASYNC240 - nothing else runs on this loop
    await road.run(road.samples)
    gate.unlink()  # noqa: ASYNC240 - the same
    async with aioredis.Redis(unix_socket_path=stage.redis_socket) as client:

        async def used() -> int:
            info: dict[str, Any] = await client.info("memory")
            return int(info["used_memory"])

        before = await used()
        stage.signal(signal.SIGSTOP)
        try:
            run = asyncio.create_task(road.run(rollouts, window=2 * rollouts))
            tickets = rollouts // road.samples
            await _until(run, lambda: _is(road.broker.depth(Hop.GENERATE), tickets - 2))
            await asyncio.sleep(_GLANCE)
            queued = await used()
        finally:
            stage.signal(signal.SIGCONT)
        await _until(run, lambda: _begun(road))
        in_flight = await used()
        gate.touch()  # noqa: ASYNC240 - the same
        await run
    return {
        "bytes_queued": (queued - before) / rollouts,
        "bytes_in_flight": (in_flight - before) / rollouts,
    }


async def _is(number: Awaitable[int], wanted: int) -> bool:
    return await number >= wanted


async def _begun(road: Road) -> bool:
    """Tell whether all that was accepted is in workers' hands."""
    return all(run.queued == 0 and run.accepted for run in await road.ledger.runs())


async def _until(run: asyncio.Task[tuple[float, Seen]], true: Callable[[], Awaitable[bool]]) -> None:
    while not await true():
        if run.done():
            run.result()
            msg = "the run was over before it could be looked at"
            raise RuntimeError(msg)
        await asyncio.sleep(_GLANCE)
