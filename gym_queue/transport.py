"""kombu's Redis transports, for brokers that come and go.

kombu takes an answer such as ``READONLY`` (a master that was demoted) or ``MISCONF`` (its disk is full) for
a mistake of the caller, and Celery's consumer leaves it unread. Here every error of Redis is a lost
connection: whoever meets one connects again, patiently.
"""

from __future__ import annotations

import logging
import socket
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from kombu.exceptions import OperationalError
from kombu.transport import TRANSPORT_ALIASES, redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from gym_queue import redis_address

_TIMEOUT = 10.0
"""Seconds that an answer may take. More than the longest stall of a busy Redis (it syncs its file)."""

_SENTINEL_TIMEOUT, _NEVER = 1.0, Retry(NoBackoff(), 0)
"""Seconds. There are other Sentinels to ask, rather than this one again."""

_RETRIES = {"max_retries": 1, "interval_start": 0.1}
"""How kombu tries to connect where it does so unasked. Who needs a connection is patient itself, and can be
interrupted.
"""


RECONNECT = {"interval_start": 0.1, "interval_step": 0.1, "interval_max": 2.0}
"""Seconds between attempts to connect, for who is patient. Celery's 30 would keep a worker away for that long
after the broker is back.
"""


class RedisTransport(redis.Transport):
    """``redis://``, ``rediss://`` and unix sockets."""

    connection_errors = (*redis.Transport.connection_errors, RedisError, OperationalError)


class SentinelTransport(redis.SentinelTransport):
    """``sentinel://``: the master that the sentinels name at each connect."""

    connection_errors = (*redis.SentinelTransport.connection_errors, RedisError, OperationalError)


def install() -> None:
    """Make kombu use these for its own names, so that URLs and tools (Flower) stay the usual ones."""
    # It says when it puts back a message that arrived while its consumer was closed. So it should be.
    logging.getLogger("kombu.transport.virtual.base").setLevel(logging.ERROR)
    TRANSPORT_ALIASES.update(
        redis="gym_queue.transport:RedisTransport",
        rediss="gym_queue.transport:RedisTransport",
        sentinel="gym_queue.transport:SentinelTransport",
    )


def broker_url(redis_url: str) -> str:
    """Spell the address of a Redis the way kombu wants it: it differs for unix sockets and for Sentinels."""
    address = redis_address.parse(redis_url)
    if address.sentinels:
        user = ""
        if address.password:
            user = f"{quote(address.username or '', safe='')}:{quote(address.password, safe='')}@"
        return ";".join(
            f"sentinel://{user}{f'[{host}]' if ':' in host else host}:{port}/{address.db}"
            for host, port in address.sentinels
        )
    parts = urlsplit(redis_url)
    if parts.scheme != "unix":
        return redis_url
    database = parse_qs(parts.query).get("db", ["0"])[0]
    user = f"{parts.username or ''}:{parts.password}@" if parts.password else ""
    return f"redis+socket://{user}{parts.path}?virtual_host={database}"


def _keepalive() -> dict[int, int]:
    """Return socket options that notice a cut network within seconds, where the system has them."""
    wanted = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}
    return {getattr(socket, name): value for name, value in wanted.items() if hasattr(socket, name)}


def options(redis_url: str) -> dict[str, Any]:
    """Return kombu's transport options: no acknowledgement emulation, one priority, deaths noticed soon."""
    address = redis_address.parse(redis_url)
    timeouts = {"socket_timeout": _TIMEOUT, "socket_connect_timeout": _TIMEOUT / 2}
    sentinels: dict[str, Any] = {}
    if address.sentinels:
        short = {"socket_timeout": _SENTINEL_TIMEOUT, "socket_connect_timeout": _SENTINEL_TIMEOUT}
        sentinels["master_name"] = address.master
        sentinels["sentinel_kwargs"] = short | {"password": address.sentinel_password, "retry": _NEVER}
    return {
        "ack_emulation": False,
        "priority_steps": [0],
        "socket_keepalive": True,
        "socket_keepalive_options": _keepalive(),
        "health_check_interval": _TIMEOUT / 2,
        **timeouts,
        **sentinels,
        **_RETRIES,
    }
