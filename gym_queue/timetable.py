"""Celery beat, for a broker that comes and goes. Its timetable is in memory: there is no file to be torn."""

from __future__ import annotations

import logging
import platform
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from celery.beat import Scheduler, SchedulingError
from celery.signals import beat_init, setup_logging

from gym_queue import names
from gym_queue.celery_app import make_app
from gym_queue.telemetry import catalogue as the
from gym_queue.telemetry.logging import configure_process
from gym_queue.telemetry.outage import Outage
from gym_queue.telemetry.port import Port
from gym_queue.transport import RECONNECT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from celery import Celery

    from gym_queue.settings import Settings
    from gym_queue.telemetry.catalogue import Family

_log = logging.getLogger(__name__)

_LATE = 3
"""Intervals of the timetable without anything sent, after which beat is not ready."""


class Timetable(Scheduler):
    """Sends what is due. What a broker does not take is not sent later: the next is soon due."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._outage = Outage(_log, "the broker")
        self._sent_at: float | None = None
        self._sweeps = {"sent": 0, "refused": 0}
        super().__init__(*args, **kwargs)

    def _ensure_connected(self) -> Any:
        """Connect for the first time, however long it takes."""
        return self.connection.ensure_connection(
            lambda error, _interval: self._outage.goes_on(error), **RECONNECT
        )

    def apply_entry(self, entry: Any, producer: Any = None) -> None:
        """Send one task, and say once if that cannot be done."""
        try:
            self.apply_async(entry, producer=producer, advance=False)
            self._sign(producer)
        except (SchedulingError, *self.connection.connection_errors) as error:
            self._sweeps["refused"] += 1
            self._outage.goes_on(error)
        else:
            self._sweeps["sent"] += 1
            self._sent_at = time.monotonic()
            self._outage.is_over()

    def _sign(self, producer: Any) -> None:
        """Leave word that beat is at work, for ``gym-queue doctor``."""
        redis = producer.channel.client
        redis.set(names.beat_key(), platform.node(), ex=names.BEAT_REMEMBERED)

    def trouble(self) -> list[str]:
        """Return why beat does not do its work, a sentence each. Any thread may ask."""
        if self._outage.is_on:
            return ["the broker cannot be used"]
        if self._sent_at is None:
            return ["nothing was due yet"]
        silence = time.monotonic() - self._sent_at
        longest = _LATE * max(entry.schedule.run_every.total_seconds() for entry in self.schedule.values())
        return [f"nothing was sent for {silence:.0f} s"] if silence > longest else []

    def families(self) -> Iterator[Family]:
        """Yield beat's metrics. Any thread may ask."""
        yield the.READY.family().add(not self.trouble(), "beat")
        sweeps = the.SWEEPS.family()
        for outcome, count in self._sweeps.items():
            sweeps.add(count, outcome)
        yield sweeps


def make_beat(settings: Settings, timetable: dict[str, Any]) -> Celery:
    """Return the app of ``celery beat``. ``timetable`` is in Celery's own form."""
    app = make_app("beat", settings)
    app.conf.update(beat_schedule=timetable, beat_scheduler=f"{__name__}:{Timetable.__qualname__}")
    setup_logging.connect(partial(_configure_logging, settings), weak=False)
    if settings.metrics_port:
        beat_init.connect(partial(_open_port, settings), weak=False)
    return app


def _configure_logging(settings: Settings, **_: Any) -> None:
    configure_process(settings, "beat")


def _open_port(settings: Settings, sender: Any, **_: Any) -> None:
    """Show how the timetable of a beat that starts is doing."""
    Port(sender.scheduler.trouble, sender.scheduler.families).open(
        settings.metrics_host, settings.metrics_port
    )
