"""How many workers one Redis and one coordinator can keep busy: a simulation, for machines with too few
cores to try it. Every part is a server with one core of its own; service times are exponential around what
was measured.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.measurement import Sample

_TICKETS = 20_000
_WINDOW = 1024
_SLOTS = 4 * 256
"""The window of a fleet: rollouts that are open for each worker, at least ``_WINDOW`` in all."""

_ROAD = ("coordinator", "redis", "workers", "redis", "coordinator")
"""Fed, accepted and taken, worked on, written, archived."""


class _Server:
    """``cores`` customers at once, the others in line. ``seconds`` is the mean of a visit."""

    def __init__(self, cores: int, seconds: float) -> None:
        self.cores = cores
        self.seconds = seconds
        self.line: deque[tuple[int, int]] = deque()
        self.at_work = 0
        self.worked = 0.0


def simulate(each: Mapping[str, float], samples: int, workers: int) -> Sample:
    """Return rollouts a second and how busy each part is (%), from ``each``: CPU-us a rollout by part.

    A ticket of ``samples`` rollouts visits the parts in the order of the road; as many as the window holds
    are on it at once. Redis and the coordinator are visited twice, for half of their time each.
    """
    draw = random.Random(samples * 100 + workers)
    coordinator = sum(each.get(part, 0.0) for part in ("feeder", "aggregator", "event loop"))
    seconds = {"coordinator": coordinator / 2, "redis": each["redis"] / 2, "workers": each["workers"]}
    servers = {
        name: _Server(workers if name == "workers" else 1, samples * microseconds / 1e6)
        for name, microseconds in seconds.items()
    }
    tickets = max(1, max(_WINDOW, _SLOTS * workers) // samples)
    now, begun, done = 0.0, 0, 0
    events: list[tuple[float, int, int]] = []

    def arrive(ticket: int, step: int) -> None:
        server = servers[_ROAD[step]]
        if server.at_work == server.cores:
            server.line.append((ticket, step))
            return
        server.at_work += 1
        service = draw.expovariate(1 / server.seconds)
        server.worked += service
        heapq.heappush(events, (now + service, ticket, step))

    while begun < min(tickets, _TICKETS):
        arrive(begun, 0)
        begun += 1
    while done < _TICKETS:
        now, ticket, step = heapq.heappop(events)
        server = servers[_ROAD[step]]
        server.at_work -= 1
        if server.line:
            arrive(*server.line.popleft())
        if step + 1 < len(_ROAD):
            arrive(ticket, step + 1)
            continue
        done += 1
        if begun < _TICKETS:
            arrive(begun, 0)
            begun += 1
    return {
        "rate": _TICKETS * samples / now,
        "busy": {name: 100 * server.worked / now / server.cores for name, server in servers.items()},
    }
