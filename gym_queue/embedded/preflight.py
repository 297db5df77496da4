"""Whether a Redis that somebody else runs can carry the ledger: asked before anything is started."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel

from gym_queue import names, redis_address
from gym_queue.embedded.redis import OLDEST, version_of
from gym_queue.errors import RedisAwayError, StackError, UsageError
from gym_queue.ledger.edge import passes
from gym_queue.redis_address import without_password

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gym_queue.redis_address import RedisAddress

_log = logging.getLogger(__name__)

_PATIENCE = 10.0
"""Seconds. A Redis that starts again, or fails over, is back by then; a wrong URL is not waited for in vain
much longer.
"""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 1.0
_TIMEOUT = 5.0
_OPTIONS: dict[str, Any] = {
    "socket_connect_timeout": _TIMEOUT,
    "socket_timeout": _TIMEOUT,
    "retry": Retry(NoBackoff(), 0),
}


async def await_redis(url: str, patience: float = _PATIENCE) -> None:
    """Do as ``check_redis`` does, and ask one that is away again for ``patience`` seconds.

    It may be starting, loading its file, or closing connections. What no time can heal is raised at once.
    """
    give_up, pause, told = time.monotonic() + patience, _FIRST_PAUSE, False
    while True:
        try:
            await asyncio.to_thread(check_redis, url)
        except RedisAwayError as error:
            if time.monotonic() >= give_up:
                raise
            if not told:
                _log.warning("%s; waiting up to %g s for it", error, patience)
            told = True
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            return


class Beat(NamedTuple):
    """When beat last sent what was due, in seconds before now, and from which machine."""

    node: str
    age: float


def check_redis(url: str) -> dict[str, Any]:
    """Check that the Redis at ``url`` answers, lets us in, is new enough and forgets nothing when it is full.

    Returns what its INFO says.

    Raises:
        RedisAwayError: it does not answer; this and the others are one sentence, without the URL's password.
        StackError: it answers, and will not do.
    """
    with _open(url) as client:
        info = _info(client, url)
    _refuse_unfit(without_password(url), info)
    return info


def clock_ahead(url: str) -> float:
    """Return by how many seconds the clock of Redis is ahead of this machine's. Raises as ``check_redis``."""
    with _open(url) as client:
        _info(client, url)
        before = time.time()
        seconds, microseconds = client.time()
        return float(seconds + microseconds / 1e6 - (before + time.time()) / 2)


def last_beat(url: str) -> Beat | None:
    """Return when beat last sent what was due; ``None`` if that is days ago. Raises as ``check_redis``."""
    with _open(url) as client:
        _info(client, url)
        node: Any = client.get(names.beat_key())
        left = client.pttl(names.beat_key())
    return None if node is None else Beat(node.decode(), names.BEAT_REMEMBERED - left / 1000)


@contextlib.contextmanager
def _open(url: str) -> Iterator[Redis]:
    shown = without_password(url)
    try:
        with _client(redis_address.parse(url)) as client:
            yield client
    except UsageError as error:
        raise StackError(str(error)) from error
    except ValueError as error:
        msg = f"the Redis URL {shown} cannot be used: {error}"
        raise StackError(msg) from error
    except RedisError as error:
        msg = f"the Redis at {shown} does not answer: {error}"
        raise (RedisAwayError if passes(error) else StackError)(msg) from error


@contextlib.contextmanager
def _client(address: RedisAddress) -> Iterator[Redis]:
    """Connect to the Redis itself, or to the master that the Sentinels know."""
    protocol = {"protocol": 2}  # Redis 5 does not know HELLO; we want its version, not its complaint
    if not address.sentinels:
        with Redis.from_url(address.url, **protocol, **_OPTIONS) as client:
            yield client
        return
    asked = Sentinel(address.sentinels, sentinel_kwargs={"password": address.sentinel_password, **_OPTIONS})
    with contextlib.ExitStack() as stack:
        for sentinel in asked.sentinels:
            stack.enter_context(sentinel)
        login = {"db": address.db, "username": address.username, "password": address.password}
        yield stack.enter_context(asked.master_for(address.master, **login, **protocol, **_OPTIONS))


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
    except MasterNotFoundError as error:
        msg = f"the Sentinels of {shown} know no such master, or none that lives: {error}"
        raise RedisAwayError(msg) from error
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
