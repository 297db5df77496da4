"""The only Celery configuration, and the broker that carries tickets with it.

Celery delivers; the ledger decides. So the transport runs without acknowledgement emulation: a ticket that
dies with its worker is missed by the audit and published again, and one published twice is refused by the
claim.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from amqp.exceptions import ChannelError
from celery import Celery
from kombu.entity import Exchange, Queue
from kombu.exceptions import KombuError
from kombu.utils.uuid import uuid
from redis.exceptions import RedisError

from gym_queue import names, transport
from gym_queue.errors import BrokerError, redis_refusal
from gym_queue.records import Ticket
from gym_queue.telemetry.story import outside

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.records import Stage
    from gym_queue.settings import Settings

_EXCHANGE = Exchange("gym_queue", type="direct")
QUEUES = {
    name: Queue(name, _EXCHANGE, routing_key=name)
    for name in (names.ROLLOUT_QUEUE, names.VERIFY_QUEUE, names.MAINTENANCE_QUEUE)
}

_LARGEST_BATCH = 1000
_ERRORS = (OSError, KombuError, RedisError)
_PATIENCE, _PAUSE = 10.0, 0.2
"""Seconds that tickets wait for a broker that is away, and between two tries. The audit has more."""

transport.install()


def make_app(name: str, settings: Settings, consume: Sequence[str] = ()) -> Celery:
    """Return a configured app.

    Args:
        name: shown in logs and in Flower.
        settings: the process's settings.
        consume: names of the queues that a worker of this app pulls from.
    """
    app = Celery(name, set_as_current=False)
    app.conf.update(
        broker_url=transport.broker_url(settings.redis_url),
        broker_transport_options=transport.options(settings.redis_url),
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
        worker_prefetch_multiplier=1,
        worker_disable_rate_limits=True,
        worker_enable_prefetch_count_reduction=False,  # what runs holds no message of a new connection
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
        enable_utc=True,
        shutdown_grace=settings.shutdown_grace,
    )
    return app


def encode(ticket: Ticket) -> tuple[Any, ...]:
    """Return a ticket as the arguments of its task."""
    return (ticket.run_id, ticket.example_index, ticket.samples, ticket.attempt, ticket.losses)


def decode(
    stage: Stage, run_id: str, example_index: int, samples: Sequence[int], attempt: int, losses: int
) -> Ticket:
    """Return the ticket that the arguments of a stage's task are."""
    return Ticket.model_construct(
        stage=stage,
        run_id=run_id,
        example_index=example_index,
        samples=tuple(samples),
        attempt=attempt,
        losses=losses,
    )


def _translated(error: Exception) -> BrokerError:
    """Give a failure of the driver its class; kombu hides what Redis said behind errors of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if refusal := redis_refusal(str(cause)):
            return BrokerError(refusal)
        cause = cause.__cause__ or cause.__context__
    return BrokerError(f"broker: {error}")


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
            self._flusher = outside(self._flush())
        await future

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            batch, self._queue = self._queue, []
            tickets = [ticket for some, _ in batch for ticket in some]
            failure: BrokerError | None = None
            try:
                await loop.run_in_executor(self._thread, self._send, tickets)
            except _ERRORS as error:
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
        """Send them, again if a connection failed under them: one ticket too many is harmless."""
        patience = time.monotonic() + _PATIENCE
        while True:
            try:
                self._send_once(tickets)
                break
            except _ERRORS:
                self._disconnect()
                if time.monotonic() > patience:
                    raise
                time.sleep(_PAUSE)

    def _send_once(self, tickets: Sequence[Ticket]) -> None:
        if self._producer is None:
            self._producer = self._app.amqp.Producer(self._app.connection_for_write(), auto_declare=False)
        with self._producer.batch(max_size=_LARGEST_BATCH):
            for ticket in tickets:
                self._send_one(ticket)

    def _send_one(self, ticket: Ticket) -> None:
        """Send a message of Celery's protocol 2, without the headers that say nothing: Redis keeps each of
        them for every ticket that waits, and a worker reads them.
        """
        task_id = uuid()
        headers = {
            "lang": "py",
            "task": names.TASK_OF_STAGE[ticket.stage],
            "id": task_id,
            "root_id": task_id,
            "argsrepr": f"{ticket.run_id} {ticket.example_index} {ticket.samples} attempt {ticket.attempt}",
            "ignore_result": True,
        }
        self._producer.publish(
            (encode(ticket), {}, {}),
            exchange="",
            routing_key=names.QUEUE_OF_STAGE[ticket.stage],
            headers=headers,
            serializer="json",
            delivery_mode=2,
            correlation_id=task_id,
        )

    async def depth(self, stage: Stage) -> int:
        """Return how many tickets lie in the queue of a stage. Raises ``BrokerError``."""
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, self._depth, names.QUEUE_OF_STAGE[stage]
            )
        except _ERRORS as error:
            raise _translated(error) from error

    def _depth(self, queue: str) -> int:
        with self._app.connection_for_read() as connection, connection.channel() as channel:
            try:
                return int(channel.queue_declare(queue=queue, passive=True).message_count)
            except ChannelError:  # no such queue: nobody published or consumed yet
                return 0

    async def close(self) -> None:
        """Close the connection and the thread."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        self._thread.shutdown(wait=False)

    def _disconnect(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.connection.release()
