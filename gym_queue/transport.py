"""kombu's Redis transports, for brokers that come and go.

kombu takes an answer such as ``READONLY`` (a master that was demoted) or ``MISCONF`` (its disk is full) for
a mistake of the caller, and Celery's consumer leaves it unread. Here every error of Redis is a lost
connection: whoever meets one connects again, patiently.

kombu also asks for one message at a time. Here a consumer with much room takes some more with it, where many
wait: a small share of them, so that other consumers find theirs.
"""

from __future__ import annotations

import json
import logging
import socket
from queue import Empty
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


_MOST_AT_ONCE = 16
"""Messages that a consumer takes in one go, beside the one that it waits for."""

_TAKE_MORE = """
local count = math.min(ARGV[1], math.floor(redis.call('LLEN', KEYS[1]) / 64))
return count > 0 and redis.call('RPOP', KEYS[1], count) or {}
"""
"""Take at most so many, and at most a 64th of what waits, so that no consumer of a fleet goes short."""


class _Channel(redis.Channel):
    """Sends two questions at once: wait for a message, and take some more if many wait."""

    _asked = False

    def _brpop_start(self, timeout: float | None = None) -> None:
        super()._brpop_start(timeout)
        room = self.qos.can_consume_max_estimate() or 0
        self._asked = bool(self._in_poll) and room > 1 and len(self.active_queues) == 1
        if self._asked:
            (queue,) = self.active_queues
            most = min(room - 1, _MOST_AT_ONCE)
            self.client.connection.send_command("EVAL", _TAKE_MORE, 1, self._q_for_pri(queue, 0), most)

    def _brpop_read(self, **options: Any) -> bool:
        connection = self.client.connection
        try:
            found = self.client.parse_response(connection, "BRPOP", **options)
            more = self.client.parse_response(connection, "EVAL") if self._asked else ()
        except BaseException:  # the other answer may still be on its way: nobody must take it for one of his
            connection.disconnect()
            raise
        finally:
            self._in_poll = False
            self._flush_brpop_reauth()
        if found:
            queue = found[0].decode().rsplit(self.sep, 1)[0]
            self._queue_cycle.rotate(queue)
            self.connection._deliver(json.loads(found[1]), queue)  # noqa: SLF001 - as kombu does
        if more:
            (queue,) = self.active_queues
            for message in more:
                self.connection._deliver(json.loads(message), queue)  # noqa: SLF001 - the same
        if not found and not more:
            raise Empty
        return True


class _SentinelChannel(_Channel, redis.SentinelChannel):
    """The same, on the master that the Sentinels name."""


class _QuietHub:
    """kombu's event loop, for a transport that registers its sockets again at each turn: once is enough."""

    def __init__(self, hub: Any) -> None:
        self._hub = hub

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hub, name)

    def add_reader(self, descriptor: int, callback: Any, *arguments: Any) -> None:
        if self._hub.readers.get(descriptor) != (callback, arguments):
            self._hub.add_reader(descriptor, callback, *arguments)


class _Transport(redis.Transport):
    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Let the event loop wait for messages."""
        super().register_with_event_loop(connection, _QuietHub(loop))


class RedisTransport(_Transport):
    """``redis://``, ``rediss://`` and unix sockets."""

    Channel = _Channel
    connection_errors = (*redis.Transport.connection_errors, RedisError, OperationalError)


class SentinelTransport(_Transport, redis.SentinelTransport):
    """``sentinel://``: the master that the sentinels name at each connect."""

    Channel = _SentinelChannel
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
