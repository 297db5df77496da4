"""What the Celery workers share: the app, a caretaker, and one pipeline a process."""

from __future__ import annotations

import asyncio
import os
import platform
import secrets
import signal
import threading
from typing import TYPE_CHECKING, Any

from celery.signals import setup_logging

from gym_queue import assembly, names
from gym_queue.celery_app import CeleryBroker, make_app
from gym_queue.pipeline import Pipeline
from gym_queue.settings import Settings
from gym_queue.telemetry.logging import configure_process
from gym_queue.telemetry.machine import machine
from gym_queue.telemetry.tracing import make_tracer
from gym_queue.worker.asyncio_pool import FollowPrefetch
from gym_queue.worker.caretaker import Caretaker, SweepWhenTold, TakeCare
from gym_queue.worker.port import OpenPort, WorkerPort
from gym_queue.worker.prefork_pool import watch

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from gym_queue.engines.base import Engine
    from gym_queue.pipeline import Attempt
    from gym_queue.records import Fence, Ticket
    from gym_queue.telemetry.story import Observer
    from gym_queue.worker.prefork_pool import ChildEndedError


class Worker:
    """One Celery worker: its app, and what each of its processes makes for itself when it first needs it.

    ``name`` is new at every start, so that a worker that comes back does not pass for the one it was.
    """

    def __init__(self, kind: str, queue: str, pool: str) -> None:
        self.settings = Settings()
        self.kind = kind
        self.name = f"{kind}-{platform.node()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.app: Any = make_app(f"workers.{kind}", self.settings, [queue])
        self.app.conf.worker_pool = f"gym_queue.worker.{pool}"
        self.app.conf.worker_consumer = "gym_queue.worker.consumer:PatientConsumer"
        self.app.gym_queue_worker = self
        self.app.steps["consumer"].add(TakeCare)
        self.caretaker = Caretaker(self)
        self.pool: Any = None
        self.hub: Any = None
        self.consumer: Any = None
        self.port = WorkerPort(self) if self.settings.metrics_port else None
        self.app.steps["worker"].add(OpenPort)
        setup_logging.connect(self._configure_logging, weak=False)
        self._lock = threading.Lock()
        self._pid = 0

    def _configure_logging(self, **_: Any) -> None:
        configure_process(self.settings, self.kind)

    def begin(self, consumer: Any) -> None:
        """Celery's parts are there, and the broker. On the main thread, after each (re)connect."""
        self.consumer, self.pool, self.hub = consumer, consumer.pool, consumer.hub
        signal.signal(signal.SIGINT, signal.getsignal(signal.SIGTERM))  # Ctrl-C means the same
        self.caretaker.start()

    def running(self) -> Collection[Attempt]:
        """Return what is worked on. Any thread may ask."""
        raise NotImplementedError

    def drop(self, fences: Sequence[Fence]) -> None:
        """Stop working on these. Any thread may ask."""
        raise NotImplementedError

    def info(self) -> dict[str, str]:
        """Return what the worker says of itself with each renewal of its lease. Any thread may ask."""
        return {
            "kind": self.kind,
            "node": platform.node(),
            "machine": machine(),
            "pid": str(os.getpid()),
            "slots": str(self.pool.limit),
            "used": str(self.pool.used),
        } | ({"metrics": self.port.url} if self.port else {})

    @property
    def pipeline(self) -> Pipeline:
        """This process's pipeline: after a fork, nothing of the parent's is used."""
        with self._lock:
            if self._pid != os.getpid():
                self._pid = os.getpid()
                self._engines: dict[str, Engine] = {}
                self._pipeline = self._make_pipeline()
            return self._pipeline

    def _make_pipeline(self, **options: Any) -> Pipeline:
        ledger, broker = assembly.make_ledger(self.settings), CeleryBroker(self.app)
        observers: list[Observer] = [self.port.meter] if self.port else []
        if tracer := make_tracer(self.kind, self.name):
            observers.append(tracer)
        return Pipeline(
            *(ledger, broker, self._engine, assembly.make_environment, self.name),
            observers=observers,
            **options,
        )

    async def _engine(self, model: str) -> Engine:
        if model not in self._engines:
            self._engines[model] = assembly.make_engine(model, self.settings)
        return self._engines[model]


class GpuWorker(Worker):
    """Generates: many rollouts at once, on the event loop of its pool."""

    def __init__(self) -> None:
        super().__init__("gpu", names.ROLLOUT_QUEUE, "asyncio_pool:AsyncioPool")
        self.app.conf.worker_concurrency = self.settings.concurrency
        self.app.steps["consumer"].add(FollowPrefetch)

    def _make_pipeline(self, **options: Any) -> Pipeline:
        free = self.pool.free_slot
        return super()._make_pipeline(slots=self.settings.concurrency, ended=free, **options)

    def running(self) -> Collection[Attempt]:
        """See ``Worker.running``."""
        return self.pipeline.running()

    def drop(self, fences: Sequence[Fence]) -> None:
        """See ``Worker.drop``."""
        self.pool.loop.call_soon_threadsafe(self.pipeline.drop, fences)


class CpuWorker(Worker):
    """Verifies, one rollout at a time in each child of its pool, and sweeps."""

    def __init__(self) -> None:
        super().__init__("cpu", names.VERIFY_QUEUE, "prefork_pool:PreforkPool")
        self.app.steps["consumer"].add(SweepWhenTold)

    def _make_pipeline(self, **options: Any) -> Pipeline:
        self._runner = asyncio.Runner()
        return super()._make_pipeline(watch=watch, **options)

    def verify(self, ticket: Ticket) -> None:
        """Verify what a ticket is for, in a child."""
        work = self.pipeline.verify(ticket)
        self._runner.run(work)

    def running(self) -> Collection[Attempt]:
        """See ``Worker.running``."""
        found: Collection[Attempt] = self.pool.running()
        return found

    def drop(self, fences: Sequence[Fence]) -> None:
        """See ``Worker.drop``."""
        self.hub.call_soon(self.pool.drop, fences)

    def child_ended(self, error: ChildEndedError) -> None:
        """A child of the pool ended in the middle of a ticket. On the main thread."""
        self.caretaker.report(error.ticket, error.failure_class, str(error))
