"""What is said of Redis, and how scripts are put into batches: without a Redis."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from gym_queue.errors import LedgerError
from gym_queue.ledger.connection import _MasterPool
from gym_queue.ledger.edge import Notice
from gym_queue.ledger.scripts import Scripts

if TYPE_CHECKING:
    import pytest


def test_what_is_said_is_said_once_for_each_reason(caplog: pytest.LogCaptureFixture) -> None:
    notice = Notice()
    for _ in range(2):
        for call in ("accept", "open_run"):
            notice.refused(call, "Redis is full")
        notice.refused("claim", "Redis is odd")
    notice.answered("heartbeat")
    notice.answered("accept")
    notice.answered("open_run")
    notice.refused("claim", "Redis is odd")
    notice.refused("accept", "Redis is full")
    assert [record.getMessage() for record in caplog.records] == [
        "Redis is full; waiting",
        "Redis is odd; waiting",
        "Redis takes calls again",
        "Redis is full; waiting",
    ]


async def test_calls_that_came_while_redis_was_away_do_not_queue_up_for_its_answer() -> None:
    class DeadEdge:
        tries = 0

        async def call(self, *_: object) -> None:
            self.tries += 1
            raise LedgerError("Redis does not answer")

    edge: Any = DeadEdge()
    scripts = Scripts(edge)
    answers = await asyncio.gather(
        *(scripts.run("claim", [], []) for _ in range(2000)), return_exceptions=True
    )
    assert edge.tries == 1
    assert len({id(answer) for answer in answers}) == 2000
    assert {str(answer) for answer in answers} == {"Redis does not answer"}


async def test_idle_connections_to_a_master_that_is_none_any_more_are_dropped() -> None:
    class Sentinels:
        master = ("one", 1)

        async def discover_master(self, _: str) -> tuple[str, int]:
            return self.master

    class Connection:
        connected = True

        async def disconnect(self, *, nowait: bool) -> None:
            self.connected = False

    sentinels: Any = Sentinels()
    pool = _MasterPool("main", sentinels)  # type: ignore[no-untyped-call]
    assert await pool.get_master_address() == ("one", 1)
    idle: Any = Connection()
    pool._available_connections.append(idle)
    assert await pool.get_master_address() == ("one", 1)
    assert idle.connected
    sentinels.master = ("two", 2)
    assert await pool.get_master_address() == ("two", 2)
    assert not idle.connected
    assert not pool._available_connections


async def test_many_large_rows_go_in_parts() -> None:
    class Batches:
        def __init__(self) -> None:
            self.seen: list[int] = []

        async def call(self, _: str, do: Any) -> list[bool]:
            (batch,) = do.args
            self.seen.append(len(batch))
            return [True] * len(batch)

        def taken(self, _: str) -> None:
            pass

    edge: Any = Batches()
    scripts = Scripts(edge)
    small, large, huge = b"x" * 10, b"x" * 1_500_000, b"x" * 9_000_000
    rows = [large, large, large, huge, small, *[small] * 600]
    assert all(await asyncio.gather(*(scripts.run("commit", ["key"], [row]) for row in rows)))
    assert edge.seen == [2, 1, 1, 512, 89]
