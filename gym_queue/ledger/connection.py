"""How the ledger reaches Redis: connections that notice when the network is cut, and clients that follow a
failover.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis.asyncio as aioredis
from hiredis import pack_command
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

from gym_queue import redis_address

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.redis_address import RedisAddress


@dataclass(frozen=True)
class Patience:
    """How long a caller can wait, in seconds: for a connection, for an answer, and, once a call has failed,
    for the same one repeated.
    """

    connect: float
    answer: float
    repeat: float

    @property
    def block(self) -> float:
        """Seconds that a read may wait in Redis for something to come: such an answer must not pass for
        late.
        """
        return self.answer / 2


PATIENT = Patience(connect=5.0, answer=10.0, repeat=10.0)
IMPATIENT = Patience(connect=1.0, answer=2.0, repeat=0.0)


async def _drop_idle(pool: Any) -> None:
    """Disconnect the idle connections of a pool.

    Not by its own ``disconnect``, which leaves them in the pool meanwhile: whoever takes one out then has it
    closed in its hands.
    """
    idle, pool._available_connections = pool._available_connections, []  # noqa: SLF001 - there is no other way
    for connection in idle:
        await connection.disconnect(nowait=True)


class _MasterPool(SentinelConnectionPool):
    """Connections to whichever Redis the Sentinels say is the master when one is made."""

    async def get_master_address(self) -> Any:
        """Ask the Sentinels. If the master is another one by now, idle connections lead to the old one."""
        address = await self.sentinel_manager.discover_master(self.service_name)
        if self.master_address != address:
            self.master_address = address
            await _drop_idle(self)
        return address


class Link:
    """One client of one Redis, or of whichever Redis the Sentinels say is the master."""

    def __init__(self, url: str, patience: Patience) -> None:
        address = redis_address.parse(url)
        # The edge repeats calls and limits their time (``gym_queue.ledger.edge``): the driver must not do so
        # underneath. With a ``socket_timeout`` it sends inside ``asyncio.wait_for``, which in Python 3.11
        # loses a cancellation that comes as the bytes go out: loops that call Redis would never end.
        options: dict[str, Any] = {
            "socket_connect_timeout": patience.connect,
            "socket_timeout": None,
            "retry": Retry(NoBackoff(), 0),
        }
        self._sentinel: Sentinel | None = None
        # Any: redis-py's annotations mix str, bytes and None with no regard to decode_responses.
        self.client: Any
        if address.sentinels:
            self._sentinel = Sentinel(
                address.sentinels,
                sentinel_kwargs={
                    "socket_connect_timeout": min(1.0, patience.connect),
                    "socket_timeout": min(1.0, patience.answer),
                    "password": address.sentinel_password,
                    "retry": Retry(NoBackoff(), 0),
                },
            )
            self.client = self._sentinel.master_for(
                address.master,
                connection_pool_class=_MasterPool,
                db=address.db,
                username=address.username,
                password=address.password,
                **options,
                **_tcp_options(patience),
            )
        else:
            tcp = {} if _is_unix(address) else _tcp_options(patience)
            self.client = aioredis.Redis.from_pool(
                aioredis.ConnectionPool.from_url(address.url, **options, **tcp)
            )

    async def exchange(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """Send commands in one packet and return Redis' answers, its errors among them.

        As the driver's pipeline does, without what that costs: it packs in Python, and looks at each command
        and answer for features that are not used here.
        """
        pool = self.client.connection_pool
        connection = await pool.get_connection()
        try:
            await connection.send_packed_command([pack_command(tuple(command)) for command in commands])
            answers: list[Any] = []
            for _ in commands:
                try:
                    answers.append(await connection.read_response())
                except ResponseError as error:  # whatever else happens has closed the connection
                    answers.append(error)
            return answers
        finally:
            await pool.release(connection)

    async def drop_idle(self) -> None:
        """Disconnect what is not in use: the next call connects again, to the master as it is then."""
        await _drop_idle(self.client.connection_pool)

    async def close(self) -> None:
        """Close all connections."""
        await self.client.aclose()
        for sentinel in self._sentinel.sentinels if self._sentinel else ():
            await sentinel.aclose()


def _is_unix(address: RedisAddress) -> bool:
    return address.url.startswith("unix:")


def _tcp_options(patience: Patience) -> dict[str, Any]:
    """Let the kernel notice a peer that is gone without a word, whether we wait for it or not.

    ``TCP_USER_TIMEOUT`` also ends the life of what was sent and never acknowledged: otherwise a call that was
    given up long ago might still arrive when the network heals.
    """
    wanted = {
        "TCP_KEEPIDLE": 10,
        "TCP_KEEPINTVL": 3,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": int(patience.answer * 1000),  # milliseconds
    }
    options = {getattr(socket, name): value for name, value in wanted.items() if hasattr(socket, name)}
    return {"socket_keepalive": True, "socket_keepalive_options": options}
