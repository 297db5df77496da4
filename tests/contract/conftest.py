from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gym_queue.ledger.memory import MemoryLedger
from gym_queue.ledger.redis import RedisLedger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gym_queue.ledger.base import Ledger


@pytest.fixture(params=["memory", "redis"])
async def ledger(request: pytest.FixtureRequest) -> AsyncIterator[Ledger]:
    if request.param == "memory":
        yield MemoryLedger()
        return
    redis_ledger = RedisLedger(request.getfixturevalue("redis_url"))
    yield redis_ledger
    await redis_ledger.close()
