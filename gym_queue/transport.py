"""kombu's Redis transports, for brokers that come and go.

kombu takes an answer such as ``READONLY`` (a master that was demoted), ``MISCONF`` (its disk is full), ``OOM``
or ``LOADING`` for a mistake of the caller, and Celery ends a worker for it. Here every error of Redis is a
lost connection: whoever meets one connects again, patiently.
"""

from __future__ import annotations

import socket
from typing import Any

from kombu.exceptions import OperationalError
from kombu.transport import TRANSPORT_ALIASES, redis
from redis.exceptions import RedisError

_TIMEOUT = 10.0
"""Seconds that an answer may take. More than the longest stall of a busy Redis (it syncs its file)."""

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
    TRANSPORT_ALIASES.update(
        redis="gym_queue.transport:RedisTransport",
        rediss="gym_queue.transport:RedisTransport",
        sentinel="gym_queue.transport:SentinelTransport",
    )


def _keepalive() -> dict[int, int]:
    """Return socket options that notice a cut network within seconds, where the system has them."""
    wanted = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}
    return {getattr(socket, name): value for name, value in wanted.items() if hasattr(socket, name)}


def options() -> dict[str, Any]:
    """Return kombu's transport options: no acknowledgement emulation, one priority, deaths noticed soon."""
    return {
        "ack_emulation": False,
        "priority_steps": [0],
        "socket_timeout": _TIMEOUT,
        "socket_connect_timeout": _TIMEOUT / 2,
        "socket_keepalive": True,
        "socket_keepalive_options": _keepalive(),
        "health_check_interval": _TIMEOUT / 2,
        **_RETRIES,
    }
