"""What a trainer waits for: a head asked over HTTP, through ``AsyncClient``, in a process of its own.

Prints what was found, as JSON: a ``measurement.Sample``. Head, workers and client share a machine, so that
times of the rows (the ledger's clock) and of this process can be compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, NamedTuple

import aiohttp

from benchmarks.measurement import Stage, add_arguments
from benchmarks.probes import percentiles
from benchmarks.processes import cpu_seconds
from gym_queue import AsyncClient

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from benchmarks.measurement import Sample
    from gym_queue.client.run import AsyncRun

SLEEP = 0.45
"""Seconds that a rollout of the flood takes: 512 slots then end some 1,000 a second."""

_SAMPLES = 8
_ROW = {"prompt": "What is 6 * 7?", "answer": "ok"}
_PAUSE = 0.01
"""Seconds between two questions how a run stands."""

_LONGEST_PAUSE = 0.1
"""Seconds, at most, between two probes: of random length, lest they keep step with what they measure."""

_STILL = 3.0
"""Seconds that an idle head is watched."""


class Seen(NamedTuple):
    """Something that a feed yielded: when, what the rows say of their time, and their example."""

    at: float
    accepted_at: float
    queued: float
    ended_at: float
    example_index: int


async def rollouts(run: AsyncRun) -> AsyncGenerator[Seen]:
    """Yield what a trainer sees of a run, rollout by rollout."""
    async with aclosing(run.rollouts()) as items:
        async for row in items:
            at, times = time.time(), row.timings
            yield Seen(at, times.accepted_at, times.queued or 0.0, times.ended_at, row.example_index)


async def groups(run: AsyncRun) -> AsyncGenerator[Seen]:
    """Yield what a trainer sees of a run, group by group: each ends with its last rollout."""
    async with aclosing(run.groups()) as items:
        async for group in items:
            at, times = time.time(), [row["timings"] for row in group.rollouts]
            first = min(times, key=lambda one: one["accepted_at"] + one["queued"])
            ended_at = max(one["ended_at"] for one in times)
            yield Seen(at, first["accepted_at"], first["queued"], ended_at, group.example_index)


class Probes:
    """Times of single examples, by what was waited for (seconds)."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {"submit_start": [], "end_client": []}

    def add(self, sent: float, seen: Seen) -> None:
        """Take in one: when it was sent, and what came of it."""
        self.times["submit_start"].append(seen.accepted_at + seen.queued - sent)
        self.times["end_client"].append(seen.at - seen.ended_at)

    def sample(self) -> Sample:
        """Return percentiles in ms."""
        return {name: percentiles(values) for name, values in self.times.items()}


async def appended(
    client: AsyncClient,
    samples: int,
    feed: Callable[[AsyncRun], AsyncGenerator[Seen]],
    probes: int,
    busy: asyncio.Task[None] | None = None,
    priority: int = 0,
) -> Probes:
    """Append examples to an open run, one after the other, each when the one before was seen."""
    run = await client.submit(model="stub:", samples=samples, priority=priority)
    found, pauses = Probes(), random.Random(1)
    async with aclosing(feed(run)) as items:
        for number in range(-1, probes):  # the first one warms up
            sent = time.time()
            await run.append([_ROW])
            seen = await anext(items)
            if seen.example_index != number + 1:
                msg = f"example {number + 1} was appended, and {seen.example_index} came back"
                raise RuntimeError(msg)
            if number >= 0:
                found.add(sent, seen)
            if busy is not None and busy.done():
                break
            await asyncio.sleep(pauses.uniform(0, _LONGEST_PAUSE))
    await run.close()
    return found


async def submitted(client: AsyncClient, probes: int) -> Probes:
    """Submit runs of one example, one after the other."""
    found, pauses = Probes(), random.Random(2)
    for _ in range(probes):
        sent = time.time()
        run = await client.submit(model="stub:", examples=[_ROW])
        async for seen in rollouts(run):
            found.add(sent, seen)
        await asyncio.sleep(pauses.uniform(0, _LONGEST_PAUSE))
    return found


async def still(client: AsyncClient, stage: Stage) -> Sample:
    """Return how many ms of CPU a second the head takes while nothing happens, but that a run is followed."""
    run = await client.submit(model="stub:")
    following = asyncio.create_task(anext(rollouts(run), None))
    await asyncio.sleep(1.0)
    spent, began = sum(map(cpu_seconds, stage.processes["head"])), time.monotonic()
    await asyncio.sleep(_STILL)
    spent = sum(map(cpu_seconds, stage.processes["head"])) - spent
    seconds = time.monotonic() - began
    await run.close()
    await following
    return {"head_cpu": 1e3 * spent / seconds}


async def flood(client: AsyncClient, count: int) -> AsyncRun:
    """Begin a run of rollouts that take their time."""
    run = await client.submit(
        model=f"stub:?delay={SLEEP}", samples=_SAMPLES, examples=[_ROW] * (count // _SAMPLES)
    )
    await run.flush()
    return run


async def asked(client: AsyncClient, url: str, count: int) -> Sample:
    """Ask how a run stands while its rollouts end."""
    run, took, started = await flood(client, count), [], 0.0
    async with aiohttp.ClientSession(url) as http:
        while True:
            began = time.perf_counter()
            async with http.get(f"/v1/runs/{run.run_id}") as answer:
                view = await answer.json()
            if view["state"] == "ended":
                break
            if view["succeeded"]:
                started = started or began
                took.append(time.perf_counter() - began)
            await asyncio.sleep(_PAUSE)
    return {"ended": count / (time.perf_counter() - started), "show": percentiles(took)}


async def loaded(client: AsyncClient, count: int, probes: int) -> Sample:
    """Follow the groups of a run while its rollouts end, and append to one of a higher priority meanwhile."""
    run, waited, times = await flood(client, count), [], []

    async def follow() -> None:
        async for seen in groups(run):
            waited.append(seen.at - seen.ended_at)
            times.append(seen.at)

    busy = asyncio.create_task(follow())
    found = await appended(client, 1, rollouts, probes, busy, priority=1)
    await busy
    rate = count / (times[-1] - times[0])
    return found.sample() | {"ended": rate, "end_client_of_the_flood": percentiles(waited)}


async def measure(options: argparse.Namespace) -> Mapping[str, Sample]:
    """Return a sample of each: an idle head, and one whose workers are busy."""
    stage = Stage.parse(options)
    async with AsyncClient(options.head, "") as client:
        return {
            "idle, nothing happens": await still(client, stage),
            "idle, an example is appended": (await appended(client, 1, rollouts, options.tasks)).sample(),
            "idle, a group is appended": (await appended(client, _SAMPLES, groups, options.tasks)).sample(),
            "idle, a run is submitted": (await submitted(client, options.tasks)).sample(),
            "busy, a run is shown": await asked(client, options.head, options.flood),
            "busy, an example is appended": await loaded(client, options.flood, options.tasks),
        }


def main() -> None:
    """Measure one head."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tasks", type=int, required=True, help="probes of each kind")
    parser.add_argument("--flood", type=int, required=True, help="rollouts that keep the workers busy")
    parser.add_argument("--head", required=True, help="its URL")
    add_arguments(parser)
    print(json.dumps(asyncio.run(measure(parser.parse_args()))))


if __name__ == "__main__":
    main()
