"""The only Celery configuration, and the broker that carries tickets with it.

Celery delivers; the ledger decides. So the transport runs without acknowledgement emulation: a ticket that
dies with its worker is missed by the audit and published again, and one published twice is refused by the
claim.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from amqp.exceptions import ChannelError
from celery import Celery
from kombu.entity import Exchange, Queue
from kombu.exceptions import KombuError
from kombu.utils.uuid import uuid
from redis.exceptions import RedisError

from gym_queue import names
from gym_queue.errors import REDIS_DISK_FULL, BrokerError, StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.records import Stage, Ticket
    from gym_queue.settings import Settings

_EXCHANGE = Exchange("gym_queue", type="direct")
QUEUES = {
    name: Queue(name, _EXCHANGE, routing_key=name)
    for name in (names.ROLLOUT_QUEUE, names.VERIFY_QUEUE, names.MAINTENANCE_QUEUE)
}

_LARGEST_BATCH = 1000
_VERIFY_KILL_MARGIN = 10.0
_LOST_WAIT = 0.5
"""Seconds that a dead child's result is waited for (Celery: 10). Ours are in the ledger, which needs no
waiting: a claim is given back at once, and refused if the child had committed.
"""


def broker_url(redis_url: str) -> str:
    """Spell a redis-py URL the way kombu wants it: they differ for unix sockets only."""
    parts = urlsplit(redis_url)
    if parts.scheme != "unix":
        return redis_url
    database = parse_qs(parts.query).get("db", ["0"])[0]
    user = f"{parts.username or ''}:{parts.password}@" if parts.password else ""
    return f"redis+socket://{user}{parts.path}?virtual_host={database}"


def make_app(name: str, settings: Settings, consume: Sequence[str] = ()) -> Celery:
    """Return a configured app.

    Args:
        name: shown in logs and in Flower.
        settings: the process's settings.
        consume: names of the queues that a worker of this app pulls from.
    """
    app = Celery(name, set_as_current=False)
    app.conf.update(
        broker_url=broker_url(settings.redis_url),
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "ack_emulation": False,
            "priority_steps": [0],
            "socket_keepalive": True,
            "queue_order_strategy": "priority",  # in the order of `consume`: the sweep before verifying
        },
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        result_backend=None,
        task_ignore_result=True,
        task_queues=[QUEUES[queue] for queue in consume or QUEUES],
        task_default_queue=names.MAINTENANCE_QUEUE,
        task_routes={
            names.GENERATE_TASK: {"queue": names.ROLLOUT_QUEUE},
            names.VERIFY_TASK: {"queue": names.VERIFY_QUEUE},
            names.SWEEP_TASK: {"queue": names.MAINTENANCE_QUEUE},
        },
        task_acks_late=True,
        task_annotations={names.VERIFY_TASK: {"time_limit": settings.verify_timeout + _VERIFY_KILL_MARGIN}},
        worker_prefetch_multiplier=1,
        worker_disable_rate_limits=True,
        worker_lost_wait=_LOST_WAIT,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
        enable_utc=True,
        shutdown_grace=settings.shutdown_grace,
    )
    return app


def _translated(error: Exception) -> BrokerError | StorageError:
    """Give a failure of the driver its class; kombu hides what Redis said behind errors of its own."""
    failure: BrokerError | StorageError = BrokerError(f"broker: {error}")
    cause: BaseException | None = error
    while cause is not None:
        if "MISCONF" in str(cause):
            failure = StorageError(REDIS_DISK_FULL)
        cause = cause.__cause__ or cause.__context__
    return failure


class CeleryBroker:
    """Sends tickets, many to a round trip (callers that publish at the same time share a batch), and counts
    them.

    kombu blocks, so one thread of its own does the sending. Bound to the event loop that first uses it.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publisher")
        self._queue: list[tuple[Sequence[Ticket], asyncio.Future[None]]] = []
        self._flusher: asyncio.Task[None] | None = None
        self._producer: Any = None

    async def publish(self, tickets: Sequence[Ticket]) -> None:
        """Send tickets to the queue of their stage. Raises ``BrokerError``."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((tickets, future))
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        await future

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            batch, self._queue = self._queue, []
            tickets = [ticket for some, _ in batch for ticket in some]
            failure: BrokerError | StorageError | None = None
            try:
                await loop.run_in_executor(self._thread, self._send, tickets)
            except (OSError, KombuError, RedisError) as error:
                failure = _translated(error)
                failure.__cause__ = error
            for _, future in batch:
                if future.done():
                    continue
                if failure is None:
                    future.set_result(None)
                else:
                    future.set_exception(failure)

    def _send(self, tickets: Sequence[Ticket]) -> None:
        if self._producer is None:
            self._producer = self._app.amqp.Producer(self._app.connection_for_write(), auto_declare=False)
        try:
            with self._producer.batch(max_size=_LARGEST_BATCH):
                for ticket in tickets:
                    self._send_one(ticket)
        except Exception:
            self._producer = None  # a connection that failed is not used again
            raise

    def _send_one(self, ticket: Ticket) -> None:
        arguments = (ticket.run_id, ticket.example_index, ticket.samples, ticket.attempt)
        message = self._app.amqp.as_task_v2(
            uuid(),
            names.TASK_OF_STAGE[ticket.stage],
            arguments,
            ignore_result=True,
            argsrepr=f"{ticket.run_id} {ticket.example_index} {ticket.samples} attempt {ticket.attempt}",
            kwargsrepr="",
            origin="",
        )
        headers, properties, body, _ = message
        queue = names.QUEUE_OF_STAGE[ticket.stage]
        self._producer.publish(
            body,
            exchange="",
            routing_key=queue,
            headers=headers,
            serializer="json",
            delivery_mode=2,
            **properties,
        )

    async def depth(self, stage: Stage) -> int:
        """Return how many tickets lie in the queue of a stage. Raises ``BrokerError``."""
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, self._depth, names.QUEUE_OF_STAGE[stage]
            )
        except (OSError, KombuError, RedisError) as error:
            raise _translated(error) from error

    def _depth(self, queue: str) -> int:
        with self._app.connection_for_read() as connection, connection.channel() as channel:
            try:
                return int(channel.queue_declare(queue=queue, passive=True).message_count)
            except ChannelError:  # no such queue: nobody published or consumed yet
                return 0

    async def close(self) -> None:
        """Close the connection and the thread."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, producer.connection.release)
        self._thread.shutdown(wait=False)
