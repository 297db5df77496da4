"""G5: what Redis holds of rollouts grows neither with the size of their trajectories nor with the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import redis

from gym_queue.assembly import make_ledger
from gym_queue.embedded.redis import RedisServer
from gym_queue.environments.base import Observation
from gym_queue.settings import Settings
from tests.unit.road import RUN, Road, World, group

if TYPE_CHECKING:
    from pathlib import Path

    from gym_queue.records import Example

ROLLOUTS = 200
SIZE = 256 * 1024


class Talkative(World):
    """Its conversations are long, its examples are not."""

    def __init__(self, size: int) -> None:
        super().__init__(inline=False)
        self.size = size

    def reset(self, example: Example, session: dict[str, Any]) -> Observation:
        return Observation(messages=({"role": "user", "content": "x" * self.size},))


async def peak(folder: Path, *, payload_url: str) -> tuple[int, int]:
    """Collect rollouts that nobody archives. Return the bytes of their rows, and of Redis that they took."""
    with RedisServer(folder) as server, redis.Redis.from_url(server.url) as client:
        ledger = make_ledger(Settings(redis_url=server.url, payload_url=payload_url))
        road = Road(world=Talkative(SIZE), ledger=ledger)
        tickets = await road.submit(*(group(index) for index in range(ROLLOUTS // 2)))
        before: Any = client.info("memory")
        await road.work(*tickets)
        rows = sum([len(event.row) for event in await all_events(road)])
        after: Any = client.info("memory")
        await ledger.close()
        return rows, after["used_memory_peak"] - before["used_memory"]


async def all_events(road: Road) -> list[Any]:
    events = await road.events()
    while more := await road.ledger.events(RUN, events[-1].position, 1000, 0):
        events += more
    return events


@pytest.mark.guarantee("G5")
async def test_g5_large_trajectories_travel_by_reference(tmp_path: Path) -> None:
    rows, inline = await peak(tmp_path / "inline", payload_url="")
    assert inline > rows > ROLLOUTS * SIZE
    rows, by_reference = await peak(tmp_path / "by reference", payload_url=str(tmp_path / "payloads"))
    assert rows > ROLLOUTS * SIZE
    assert by_reference < rows / 10
