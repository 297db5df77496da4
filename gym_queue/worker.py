"""What the Celery workers share: the app, the lease, and one pipeline a process."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import secrets
from typing import TYPE_CHECKING, Any

from celery import Task, bootsteps
from celery.exceptions import TimeLimitExceeded
from celery.signals import setup_logging, task_failure

from gym_queue import assembly
from gym_queue.celery_app import CeleryBroker, make_app
from gym_queue.errors import GymQueueError
from gym_queue.maintenance.reap import lose
from gym_queue.pipeline import Pipeline
from gym_queue.records import FailureClass, Stage, Ticket
from gym_queue.settings import Settings
from gym_queue.telemetry.logging import configure
from gym_queue.telemetry.machine import machine

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from gym_queue.engines.base import Engine
    from gym_queue.ledger.base import Ledger

_log = logging.getLogger(__name__)


class TicketTask(Task):
    """A task whose arguments are a ticket's: run id, example index, samples, attempt."""

    def slots(self, _run_id: str, _example_index: int, samples: Sequence[int], _attempt: int) -> int:
        """Return how many rollouts the ticket covers."""
        return len(samples)


def ticket(stage: Stage, run_id: str, example_index: int, samples: Sequence[int], attempt: int) -> Ticket:
    """Decode a task's arguments."""
    return Ticket.model_construct(
        stage=stage, run_id=run_id, example_index=example_index, samples=tuple(samples), attempt=attempt
    )


class Worker:
    """One Celery worker: its app, and what each of its processes makes for itself when it first needs it.

    ``name`` is new at every start, so that a worker that comes back does not pass for the one it was.
    """

    def __init__(
        self, kind: str, consume: Sequence[str], pool: str = "prefork", slots: int | None = None
    ) -> None:
        self.settings = Settings()
        self.kind = kind
        self.name = f"{kind}-{platform.node()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.app = make_app(f"workers.{kind}", self.settings, consume)
        self.app.conf.worker_pool = pool
        if slots is not None:
            self.app.conf.worker_concurrency = slots
        self.app.gym_queue_worker = self
        self.app.steps["consumer"].add(RenewLease)
        setup_logging.connect(self._configure_logging, weak=False)
        task_failure.connect(self._on_task_failure, weak=False)
        self._parent = os.getpid()
        self._pid = 0
        self._engines: dict[str, Engine] = {}

    def _configure_logging(self, **_: Any) -> None:
        configure(self.settings.log_level, self.kind)

    def _own(self) -> None:
        """Make what belongs to one process only: after a fork, nothing of the parent's is used."""
        if self._pid == os.getpid():
            return
        # What the parent made is kept, unused: a connection that is collected here would leave the parent's
        # event loop, whose epoll(7) a fork shares, and the parent would wait for its answers in vain.
        self._inherited = dict(vars(self)) if self._pid else {}
        self._pid = os.getpid()
        self._engines = {}
        self._runner = asyncio.Runner()
        self._ledger = assembly.make_ledger(self.settings)
        self._broker = CeleryBroker(self.app)
        self._pipeline = Pipeline(
            self._ledger, self._broker, self._engine, assembly.make_environment, worker=self.name
        )

    @property
    def pipeline(self) -> Pipeline:
        """This process's pipeline."""
        self._own()
        return self._pipeline

    @property
    def ledger(self) -> Ledger:
        """This process's ledger."""
        self._own()
        return self._ledger

    @property
    def broker(self) -> CeleryBroker:
        """This process's broker."""
        self._own()
        return self._broker

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine to its end on this process's event loop, from plain code."""
        self._own()
        return self._runner.run(work)

    async def _engine(self, model: str) -> Engine:
        if model not in self._engines:
            self._engines[model] = assembly.make_engine(model, self.settings)
        return self._engines[model]

    def _on_task_failure(self, sender: Any, exception: BaseException, args: Sequence[Any], **_: Any) -> None:
        """Report the claims of a pool child that died or was killed at its time limit, at once.

        Celery runs this in the parent, which lives and goes on renewing the lease.
        """
        if not isinstance(sender, TicketTask) or not args or os.getpid() != self._parent:
            return
        late = isinstance(exception, TimeLimitExceeded)
        failure_class = FailureClass.TIMEOUT if late else FailureClass.INFRASTRUCTURE
        try:
            self.run(
                self._lose(
                    ticket(Stage.VERIFY, *args), failure_class, f"the verifier's process ended: {exception}"
                )
            )
        except GymQueueError as error:  # the sweep finds the claim when its deadline has passed
            _log.error("could not give a lost claim back: %s", error)

    async def _lose(self, lost: Ticket, failure_class: FailureClass, error: str) -> None:
        owned = [
            attempt
            for attempt in await self.ledger.owned(self.name, None, 10_000)
            if attempt.fence.run_id == lost.run_id
            and attempt.fence.stage is lost.stage
            and attempt.fence.example_index == lost.example_index
            and attempt.fence.sample_index in lost.samples
        ]
        await lose(self.ledger, self.broker, owned, failure_class, error)


class RenewLease(bootsteps.StartStopStep):
    """Consumer step that renews the worker's lease from Celery's main thread, which a busy pool does not
    delay.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._timer: Any = None
        self._known = False
        self._runner = asyncio.Runner()
        self._ledger: Ledger | None = None

    def start(self, consumer: Any) -> None:
        """Renew now and every ``worker_heartbeat_interval`` seconds. Runs each time the consumer
        (re)connects.
        """
        worker: Worker = consumer.app.gym_queue_worker
        self._renew(worker, consumer.pool)
        interval = worker.settings.worker_heartbeat_interval
        self._timer = consumer.timer.call_repeatedly(interval, self._renew, (worker, consumer.pool))

    def _renew(self, worker: Worker, pool: Any) -> None:
        if self._ledger is None:
            self._ledger = assembly.make_ledger(worker.settings)
        info = {
            "kind": worker.kind,
            "node": platform.node(),
            "machine": machine(),
            "pid": str(os.getpid()),
            "slots": str(pool.limit),
            "used": str(getattr(pool, "used", "")),
        }
        try:
            known = self._runner.run(self._ledger.heartbeat(worker.name, info))
        except GymQueueError as error:
            _log.warning("lease not renewed: %s", error)
            return
        if self._known and not known:
            _log.warning("this worker had been given up; late writes of its old work will be refused")
        self._known = True

    def stop(self, consumer: Any) -> None:
        """Stop renewing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def shutdown(self, consumer: Any) -> None:
        """Take the lease back, if nothing is owned any more."""
        self.stop(consumer)
        if self._ledger is not None:
            try:
                self._runner.run(self._ledger.drop_lease(consumer.app.gym_queue_worker.name))
            except GymQueueError as error:
                _log.warning("lease not taken back: %s", error)
