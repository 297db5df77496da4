"""The edge between the ledger and Redis: how a client is made, and what the driver's errors mean."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from gym_queue.errors import REDIS_DISK_FULL, LedgerError

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONNECTIONS = 16
"""Enough for readers that wait beside writers; callers past that queue up for a connection."""


def connect(url: str) -> Any:
    """Return a client. Any: redis-py's annotations mix str, bytes and None with no regard to
    ``decode_responses``.
    """
    retry = Retry(ExponentialWithJitterBackoff(base=0.05, cap=2.0), retries=10)
    pool = aioredis.BlockingConnectionPool.from_url(
        url,
        max_connections=_CONNECTIONS,
        timeout=None,
        retry=retry,
        retry_on_error=[RedisConnectionError],
    )
    return aioredis.Redis.from_pool(pool)


@contextmanager
def translated() -> Iterator[None]:
    """Turn the driver's errors into ours, at the edge."""
    try:
        yield
    except RedisError as error:
        msg = REDIS_DISK_FULL if "MISCONF" in str(error) else f"Redis: {error}"
        raise LedgerError(msg) from error
