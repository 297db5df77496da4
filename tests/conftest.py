"""What tests of several folders share: a real Redis, started once, empty for each test, and both ledgers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import redis
from hypothesis import settings

from gym_queue.embedded.redis import RedisServer
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.ledger.redis import RedisLedger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from gym_queue.ledger.base import Ledger

# Examples that are slow on a busy machine are no failures; pytest-timeout ends what hangs.
settings.register_profile(
    "gym_queue", deadline=None, report_multiple_bugs=False, max_examples=100, stateful_step_count=25
)
settings.load_profile("gym_queue")


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a redis-server for all tests of this process."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """URL of a Redis that holds nothing."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


@pytest.fixture(params=["memory", "redis"])
async def ledger(request: pytest.FixtureRequest) -> AsyncIterator[Ledger]:
    if request.param == "memory":
        yield MemoryLedger()
        return
    redis_ledger = RedisLedger(request.getfixturevalue("redis_url"))
    yield redis_ledger
    await redis_ledger.close()
