from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gym_queue.embedded.redis import RedisServer
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.ledger.redis import RedisLedger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from gym_queue.ledger.base import Ledger


@pytest.fixture(params=["memory", "redis"])
async def ledger(request: pytest.FixtureRequest) -> AsyncIterator[Ledger]:
    if request.param == "memory":
        yield MemoryLedger()
        return
    redis_ledger = RedisLedger(request.getfixturevalue("redis_url"))
    yield redis_ledger
    await redis_ledger.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own, to be hurt."""
    with RedisServer(tmp_path / "redis") as running:
        yield running
