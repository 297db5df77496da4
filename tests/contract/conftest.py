"""A server of a test's own, beside the one that all tests share, and the ledgers by reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gym_queue.embedded.redis import RedisServer
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.ledger.redis import RedisLedger
from tests.contract.ledgers import MEMORY_URL, by_reference, clear_memory_url

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from gym_queue.ledger.base import Ledger


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server to be hurt."""
    with RedisServer(tmp_path / "redis") as running:
        yield running


@pytest.fixture(params=["memory", "redis", "memory by reference", "redis by reference"])
async def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Ledger]:
    redis_ledger: RedisLedger | None = None
    if request.param.startswith("redis"):
        redis_ledger = RedisLedger(request.getfixturevalue("redis_url"))
    match request.param:
        case "memory by reference":
            clear_memory_url()
            yield by_reference(MemoryLedger(), MEMORY_URL)
        case "redis by reference" if redis_ledger:
            yield by_reference(redis_ledger, str(tmp_path / "payloads"))
        case _:
            yield redis_ledger or MemoryLedger()
    if redis_ledger:
        await redis_ledger.close()
