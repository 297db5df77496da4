"""What a worker shows on its port: whether it can work, and its numbers. Everything is asked on the port's
thread.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any, Protocol

from billiard.process import current_process
from celery import bootsteps

from gym_queue.settings import variable
from gym_queue.telemetry import catalogue as the
from gym_queue.telemetry.gpu import Gpus
from gym_queue.telemetry.meter import Meter
from gym_queue.telemetry.port import Port
from gym_queue.worker import shutdown
from gym_queue.worker.prefork_pool import MOST_CHILDREN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gym_queue.settings import Settings
    from gym_queue.telemetry.catalogue import Family
    from gym_queue.worker.caretaker import Caretaker


class Shown(Protocol):
    """A worker, as its port sees it."""

    kind: str
    name: str
    settings: Settings
    caretaker: Caretaker
    pool: Any
    consumer: Any


class WorkerPort:
    """The port of one worker. Made before it forks, so that its children count into its meter."""

    def __init__(self, worker: Shown) -> None:
        self._worker = worker
        prefork = worker.kind == "cpu"
        self.meter = Meter(MOST_CHILDREN, lambda: current_process().index) if prefork else Meter()
        self._gpus: Gpus | None = None
        self._port = Port(self.trouble, self.families)

    @property
    def url(self) -> str:
        """Where it serves; empty if nowhere."""
        return self._port.url

    def open(self) -> None:
        """Begin to serve."""
        worker = self._worker
        self._gpus = Gpus() if worker.kind == "gpu" else None
        self._port.open(worker.settings.metrics_host, worker.settings.metrics_port)

    def trouble(self) -> list[str]:
        """Return why the worker cannot take work, a sentence each."""
        worker, found = self._worker, []
        if shutdown.is_under_way():
            found.append("it was told to end")
        if worker.consumer is None or not worker.consumer.is_connected:
            found.append("the broker is not connected")
        silence, timeout = worker.caretaker.silence, worker.settings.worker_timeout
        if silence is None:
            found.append("it has no lease yet")
        elif silence > timeout:
            name = variable("worker_timeout")
            found.append(f"its lease was not renewed for {silence:.0f} s ({name} is {timeout:g})")
        return found

    def families(self) -> Iterator[Family]:
        """Yield the worker's metrics."""
        worker = self._worker
        yield the.READY.family().add(not self.trouble(), worker.kind)
        yield the.WORKER_INFO.family().add(1, worker.name, worker.kind, platform.node())
        if (pool := worker.pool) is not None:
            used = pool.used
            slots = the.WORKER_SLOTS.family().add(used, "used")
            yield slots.add(max(0, pool.limit - used), "free")
        if (silence := worker.caretaker.silence) is not None:
            yield the.SILENCE.family().add(silence)
        yield from self.meter.families()
        if self._gpus is not None:
            yield from self._gpus.families()


class OpenPort(bootsteps.StartStopStep):
    """Worker step that opens the port: after the pool has forked, and before the broker is looked for.

    It is never closed: while a pool drains, whoever asks shall learn why the worker takes nothing more.
    """

    requires = ("celery.worker.components:Pool",)

    def start(self, worker: Any) -> None:
        """Runs once."""
        if (port := worker.app.gym_queue_worker.port) is not None:
            port.open()

    def stop(self, worker: Any) -> None:
        """Nothing ends before the process does."""
