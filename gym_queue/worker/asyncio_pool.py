"""A Celery pool that runs ``async def`` tasks on one event loop: thousands of waiting rollouts in one
process.

Celery 5.7 has no pool for asyncio. ``app.conf.worker_pool`` takes a dotted path, so this one needs no patch.
Celery's main thread goes on fetching messages, answering remote control and renewing the lease; the event
loop has a thread of its own, so a task that blocks the loop delays neither. Everything that touches Celery's
state runs on the main thread.

A task may cover several rollouts. It says how many with a ``slots(args)`` method, and ``free_slot`` as each
ends; the prefetch limit counts slots, not messages: the worker takes a message only while it has room.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
import threading
import time
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionInfo
from celery import bootsteps
from celery.concurrency.base import BasePool

from gym_queue.worker import shutdown

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)

_SWITCH_INTERVAL = 0.001
"""Seconds. The main thread wakes for every message; with Python's 5 ms it would wait that long for a busy
event loop.
"""

_GARBAGE = 10_000
"""Objects made and not freed between two collections. Python's 700 are less than a few rollouts need, so each
collection would find them all alive, and look at them again.
"""

_POLL = 0.05
"""Seconds between two looks at whether a shutdown has become urgent, or is done."""

_TIME_TO_HAND_BACK = 6.0
"""Seconds that cancelled tasks have to hand their work back, and environments to close (see ``pipeline``)."""


@dataclass
class _Share:
    """The slots that a task uses by now."""

    slots: int


_share: ContextVar[_Share] = ContextVar("gym_queue_share")


class AsyncioPool(BasePool):
    """See the module's docstring. ``limit`` is the number of slots."""

    signal_safe = False
    body_can_be_buffer = True
    task_join_will_block = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loop = asyncio.new_event_loop()
        self.used = 0
        self._running: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run_loop, name="asyncio-pool", daemon=True)
        self._bell, self._ear = socket.socketpair()
        self._bell.settimeout(0)
        self._has_rung = False
        self._qos: Any = None
        self._held = 0
        self._connection = 0
        self._done: deque[Callable[[], None]] = deque()
        self._typical = self.limit

    def on_start(self) -> None:
        """Start the event loop's thread."""
        sys.setswitchinterval(_SWITCH_INTERVAL)
        gc.freeze()  # what was imported stays; looking through it again and again costs a tenth of the time
        gc.set_threshold(_GARBAGE)
        self._thread.start()

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def register_with_event_loop(self, loop: Any) -> None:
        """Learn to be heard on the main thread, where kombu's hub turns. Runs after each (re)connect.

        Not with the hub's ``call_soon``: what such a call schedules (Celery acknowledges that way, and only
        then asks for more) waits until something else happens, up to a second.
        """
        loop.add_reader(self._ear, self._listen)

    def follow(self, qos: Any) -> None:
        """Learn which prefetch limit to move. Called when the consumer starts, and again after a reconnect.

        A new connection holds no messages; what still runs from the old one goes on using its slots.
        """
        self._qos = qos
        self._held = 0
        self._connection += 1
        self._move_prefetch()

    def on_apply(
        self,
        target: Any,
        args: Any = None,
        kwargs: Any = None,
        callback: Any = None,
        accept_callback: Any = None,
        **_: Any,
    ) -> None:
        """Start one task. ``args`` is what Celery gives to its tracer: name, id, request, body, type,
        encoding. It has decoded the body already, for the request.
        """
        name, _task_id, request, *_ = args
        task = self.app.tasks[getattr(name, "name", name)]
        arguments, keywords = request["args"], request["kwargs"]
        slots = task.slots(*arguments) if hasattr(task, "slots") else 1
        accept_callback(os.getpid(), time.monotonic())
        self.used += slots
        self._held += 1
        self._typical = max(slots, (self._typical + slots) // 2)
        self._move_prefetch()
        share = _Share(slots)
        ended = partial(self._ended, callback, share, self._connection)
        self.loop.call_soon_threadsafe(self._begin, task, arguments, keywords, share, ended)

    def _move_prefetch(self) -> None:
        """Let Celery hold as many messages as it does plus those that fit the free slots, as far as the last
        ones tell how large they are: none more once all are used.
        """
        if self._qos is not None:
            fitting = -(-(self.limit - self.used) // self._typical)
            self._qos.value = max(1, self._held + fitting)

    def _begin(
        self, task: Any, arguments: Any, keywords: Any, share: _Share, ended: Callable[..., None]
    ) -> None:
        running = self.loop.create_task(self._execute(task, arguments, keywords, share, ended))
        self._running.add(running)
        running.add_done_callback(self._running.discard)

    async def _execute(
        self, task: Any, arguments: Any, keywords: Any, share: _Share, ended: Callable[..., None]
    ) -> None:
        started = time.monotonic()
        failed, value = 0, None
        _share.set(share)
        try:
            value = await task.run(*arguments, **keywords)
        except asyncio.CancelledError:
            _log.debug("task %s has handed its work back", task.name)
        except Exception as error:  # noqa: BLE001 - Celery wants to know of any failure
            _log.exception("task %s failed", task.name)
            failed, value = 1, ExceptionInfo((type(error), error, error.__traceback__))
        self._tell(partial(ended, (failed, value, time.monotonic() - started)))

    def free_slot(self) -> None:
        """Note that one of the rollouts that a task covers has ended: others may take its slot while the rest
        goes on. Called on the event loop, in the context of the task.
        """
        share = _share.get()
        if share.slots > 1:  # the last one is free when the task ends
            share.slots -= 1
            self._tell(self._freed)

    def _tell(self, news: Callable[[], None]) -> None:
        """Let the main thread know."""
        self._done.append(news)
        if not self._has_rung:
            self._has_rung = True
            self._bell.send(b"!")

    def _listen(self) -> None:
        self._ear.recv(1)
        self._has_rung = False  # before the report: what ends from now on rings again
        self._report()

    def _report(self) -> None:
        """Tell Celery which tasks ended. Runs on the main thread."""
        while self._done:  # a deque: the event loop's thread appends meanwhile, and nothing may fall between
            self._done.popleft()()
        self._move_prefetch()

    def _ended(self, callback: Callable[..., None], share: _Share, connection: int, result: Any) -> None:
        callback(result)
        self.used -= share.slots
        self._held -= connection == self._connection

    def _freed(self) -> None:
        self.used -= 1

    def on_stop(self) -> None:
        """Let running tasks end within the grace period, then cancel them: they hand their work back.

        Whoever blocks the event loop, or swallows its cancellation, is left behind.
        """
        grace = float(self.app.conf.shutdown_grace)
        drained = asyncio.run_coroutine_threadsafe(self._drain(grace), self.loop)
        until, urgent = time.monotonic() + grace + _TIME_TO_HAND_BACK, False
        while not drained.done() and time.monotonic() < until:
            if shutdown.is_urgent() and not urgent:
                until, urgent = min(until, time.monotonic() + _TIME_TO_HAND_BACK), True
            time.sleep(_POLL)
        self._report()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(0.1)

    async def _drain(self, grace: float) -> None:
        until = time.monotonic() + grace
        if self._running:
            _log.info("%d tasks in flight; waiting up to %g s for them", len(self._running), grace)
        while self._running and time.monotonic() < until and not shutdown.is_urgent():
            await asyncio.wait(self._running, timeout=_POLL)
        if left := set(self._running):
            _log.info("handing %d tasks back", len(left))
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=_TIME_TO_HAND_BACK)

    on_terminate = on_stop

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        return info | {"slots-used": self.used}


class FollowPrefetch(bootsteps.StartStopStep):
    """Consumer step that hands the consumer's prefetch limit to the pool."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        """Run each time the consumer (re)connects."""
        if isinstance(consumer.pool, AsyncioPool):
            consumer.pool.follow(consumer.qos)
