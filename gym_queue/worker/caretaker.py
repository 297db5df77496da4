"""What keeps a worker in touch with the ledger: a thread with an event loop of its own.

It renews the lease, asks which work was taken away, looks for work that the ledger believes to be here and is
not, reports what was lost and, where it is asked to, sweeps. Neither a busy pool nor a broker that is away
delays it, and a ledger that is away delays nothing else: Celery's main thread never waits for the ledger.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from celery import bootsteps
from kombu.messaging import Consumer

from gym_queue import assembly, names
from gym_queue.celery_app import QUEUES
from gym_queue.errors import GymQueueError, LedgerError
from gym_queue.ledger.base import Retry
from gym_queue.maintenance.disown import disown
from gym_queue.maintenance.publication import offer
from gym_queue.maintenance.reap import lose
from gym_queue.maintenance.sweep import sweep
from gym_queue.pipeline import attempt_of, attempts_of

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine, Sequence

    from gym_queue.pipeline import Attempt
    from gym_queue.records import FailureClass, Fence, Ticket
    from gym_queue.settings import Settings

_log = logging.getLogger(__name__)

_TICK = 1.0
"""Seconds between two questions for revoked work; also before an answer that failed is asked for again."""

_MANY = 10_000

_IN_TOUCH = 3.0
"""Seconds after its last answer from which on the ledger counts as away."""

_SETTLING = 4.0
"""Seconds that the ledger must have been there before a sweep believes in silent workers: while it was away,
nobody could renew a lease.
"""

_GLANCE = 0.5
"""Seconds between two looks of a sweep at whether the ledger is still there."""

_PATIENCE_AT_THE_END, _WITHOUT_HOPE = 5.0, 1.0
"""Seconds to say farewell to the ledger, and to one that was away already."""

_TIME_TO_EXIT = 5.0


class Ward(Protocol):
    """A worker, as its caretaker sees it. All may be asked on any thread."""

    name: str
    settings: Settings
    app: Any

    def running(self) -> Collection[Attempt]:
        """Return what it works on."""
        ...

    def drop(self, fences: Sequence[Fence]) -> None:
        """Stop working on these."""
        ...

    def info(self) -> dict[str, str]:
        """Return what it says of itself with each renewal."""
        ...


class Caretaker:
    """See the module's docstring."""

    def __init__(self, ward: Ward) -> None:
        self._ward = ward
        self._heard_at = 0.0
        self._there_since = 0.0
        self._renew_at = 0.0
        self._known = False
        self._renewed_at: float | None = None
        self._idle: Collection[Attempt] = ()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeping: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="caretaker", daemon=True)

    def start(self) -> None:
        """Begin; a second call does nothing."""
        if self._thread.ident is None:
            self._loop = asyncio.new_event_loop()
            self._over = asyncio.Event()
            self._thread.start()

    @property
    def silence(self) -> float | None:
        """Seconds since the lease was renewed; ``None``: there is none yet. Any thread may ask."""
        return None if self._renewed_at is None else time.monotonic() - self._renewed_at

    def sweep(self) -> None:
        """Sweep now, if no sweep of this process is under way. Any thread may ask."""
        self._loop.call_soon_threadsafe(self._begin_sweep)

    def report(self, ticket: Ticket, failure_class: FailureClass, sentence: str) -> None:
        """Take a ticket's attempts away from the worker: the process that had it, and nothing else, is dead.

        Any thread may ask.
        """
        self._loop.call_soon_threadsafe(self._begin, self._lose(ticket, failure_class, sentence))

    def stop(self) -> None:
        """Hand back what the worker still owns, give up its lease, and end."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join(_PATIENCE_AT_THE_END + 1)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._care())

    async def _care(self) -> None:
        self._ledger = assembly.make_ledger(self._ward.settings)
        self._pulse = assembly.make_ledger(self._ward.settings, patient=False)
        self._broker = assembly.make_broker(self._ward.settings)
        self._heard_at = time.monotonic()
        self._begin(self._keep_in_touch())
        await self._over.wait()
        for task in self._tasks:
            task.cancel()
        try:
            async with asyncio.timeout(_PATIENCE_AT_THE_END if self._in_touch() else _WITHOUT_HOPE):
                await self._leave()
                await self._broker.close()
                await self._pulse.close()
                await self._ledger.close()
        except (GymQueueError, TimeoutError):
            _log.warning("left without a word, for the ledger is away; a sweep will find what is left")

    async def _keep_in_touch(self) -> None:
        while True:
            await self._tick()
            await asyncio.sleep(_TICK)

    async def _tick(self) -> None:
        try:
            if time.monotonic() >= self._renew_at:
                await self._renew()
            if revoked := await self._pulse.revoked(self._ward.name, _MANY):
                self._ward.drop(revoked)
            await self._pulse.answer_probe(self._ward.name)
        except LedgerError:  # it says so itself, once
            return
        except Exception:  # noqa: BLE001 - whatever it was: without a lease the worker loses all its work
            _log.exception("the caretaker stumbled")
            return
        if not self._in_touch():
            self._there_since = time.monotonic()
        self._heard_at = time.monotonic()

    def _in_touch(self) -> bool:
        return time.monotonic() - self._heard_at < _IN_TOUCH

    async def _renew(self) -> None:
        ward = self._ward
        known = await self._pulse.heartbeat(ward.name, ward.info())
        self._renewed_at = time.monotonic()
        if self._known and not known:
            _log.warning("this worker had been given up: others have its work now, and it drops it")
        self._known = True
        self._idle = await disown(self._pulse, self._broker, ward.name, ward.running(), self._idle)
        self._renew_at = time.monotonic() + ward.settings.worker_heartbeat_interval

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _begin_sweep(self) -> None:
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = self._begin(self._sweep())

    async def _sweep(self) -> None:
        """Sweep while the ledger is there. One that goes away ends the sweep, for when it is back, all its
        workers look silent.
        """
        if not self._in_touch() or time.monotonic() - self._there_since < _SETTLING:
            return
        settings = self._ward.settings
        payloads = assembly.make_payloads(settings)
        duty = asyncio.ensure_future(sweep(self._ledger, self._broker, settings, payloads))
        try:
            while self._in_touch() and not duty.done():
                await asyncio.wait([duty], timeout=_GLANCE)
        finally:
            duty.cancel()

    async def _lose(self, ticket: Ticket, failure_class: FailureClass, sentence: str) -> None:
        wanted = set(attempts_of(ticket))
        while True:
            try:
                owned = await self._ledger.owned(self._ward.name, None, _MANY)
                lost = [attempt for attempt in owned if attempt_of(attempt.fence) in wanted]
                await lose(self._ledger, self._broker, lost, failure_class, sentence, alone=True)
            except LedgerError:  # it says so itself, once
                await asyncio.sleep(_TICK)
            else:
                return

    async def _leave(self) -> None:
        name = self._ward.name
        retry = Retry(counted=False, reason=f"worker {name} stopped and handed it back")
        while owned := await self._ledger.owned(name, None, _MANY):
            receipts = await asyncio.gather(*(self._ledger.commit(attempt.fence, retry) for attempt in owned))
            await offer(self._broker, [receipt.ticket for receipt in receipts if receipt.ticket is not None])
        await self._ledger.drop_lease(name)


class TakeCare(bootsteps.StartStopStep):
    """Consumer step that starts the caretaker, which goes on while the broker is away and the pool drains."""

    def start(self, consumer: Any) -> None:
        """Runs each time the consumer (re)connects."""
        consumer.app.gym_queue_worker.begin(consumer)

    def stop(self, consumer: Any) -> None:
        """Nothing ends with a connection."""

    def shutdown(self, consumer: Any) -> None:
        """The pool has stopped. Whatever code of a user's holds this process back, it ends soon."""
        consumer.app.gym_queue_worker.caretaker.stop()
        for number in (signal.SIGTERM, signal.SIGINT):  # Python gives up its handlers before all else
            signal.signal(number, signal.SIG_IGN)
        last_resort = threading.Timer(_TIME_TO_EXIT, os._exit, (consumer.controller.exitcode or 0,))
        last_resort.daemon = True
        last_resort.start()


class SweepWhenTold(bootsteps.ConsumerStep):
    """Consumer step that reads the maintenance queue, beside the tickets: a full pool delays no sweep.

    A message says only that it is time. Those that pile up while a sweep is under way, or nobody listens, are
    one; so how old they are does not matter, nor whether clocks agree.
    """

    def get_consumers(self, channel: Any) -> list[Consumer]:
        """Return what listens."""
        queue = QUEUES[names.MAINTENANCE_QUEUE]
        return [Consumer(channel, [queue], on_message=self._told, no_ack=True, accept=["json"])]

    def start(self, consumer: Any) -> None:
        """Runs each time the consumer (re)connects."""
        self._caretaker: Caretaker = consumer.app.gym_queue_worker.caretaker
        super().start(consumer)

    def _told(self, _message: Any) -> None:
        self._caretaker.sweep()

    def _close(self, consumer: Any, cancel_consumers: bool = True) -> None:  # noqa: FBT001, FBT002 - Celery's
        if consumer.connection is not None:  # one that is lost has taken the channel with it
            super()._close(consumer, cancel_consumers)
