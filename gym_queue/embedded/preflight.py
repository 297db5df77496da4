"""Whether a Redis that somebody else runs can carry the ledger: asked once, before anything is started."""

from __future__ import annotations

import contextlib
import re
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError
from redis.retry import Retry

from gym_queue.embedded.redis import OLDEST, version_of
from gym_queue.errors import StackError

_TIMEOUT = 5.0


def check_redis(url: str) -> None:
    """Check that the Redis at ``url`` answers, lets us in, is new enough and forgets nothing when it is full.

    Raises:
        StackError: one sentence; a password in the URL does not appear in it.
    """
    shown = without_password(url)
    try:
        client = Redis.from_url(
            url,
            protocol=2,  # Redis 5 does not know HELLO; we want its version, not its complaint
            socket_connect_timeout=_TIMEOUT,
            socket_timeout=_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError as error:
        msg = f"the Redis URL {shown} cannot be used: {error}"
        raise StackError(msg) from error
    with contextlib.closing(client):
        _refuse_unfit(shown, _info(client, url))


def _info(client: Redis, url: str) -> dict[str, Any]:
    shown = without_password(url)
    try:
        info: dict[str, Any] = client.info()
    except NoPermissionError as error:
        msg = f"the Redis at {shown} does not let this user run INFO: {error}"
        raise StackError(msg) from error
    except AuthenticationError as error:
        what = "refuses this user or password" if shown != url else "needs a password"
        msg = f"the Redis at {shown} {what}: set GYM_QUEUE_REDIS_URL to redis://:PASSWORD@HOST:PORT/0"
        raise StackError(msg) from error
    except RedisError as error:
        msg = f"the Redis at {shown} does not answer: {error}"
        raise StackError(msg) from error
    return info


def _refuse_unfit(shown: str, info: dict[str, Any]) -> None:
    found = str(info.get("redis_version", "of unknown version"))
    if version_of(found) < OLDEST:
        msg = f"the Redis at {shown} is {found}, but {'.'.join(map(str, OLDEST))} or newer is needed"
        raise StackError(msg)
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy.startswith("allkeys-"):
        msg = f"the Redis at {shown} drops records when it is full: its maxmemory-policy must be noeviction"
        raise StackError(msg)


def without_password(url: str) -> str:
    """Return the URL as it may be shown: passwords, where redis-py reads one from, are starred out."""
    url = re.sub(r"(://[^/@]*?:)[^/]*@", r"\1***@", url)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", url)
