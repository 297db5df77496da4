"""Celery beat, for a broker that comes and goes. Its timetable is in memory: there is no file to be torn."""

from __future__ import annotations

import logging
import platform
from functools import partial
from typing import TYPE_CHECKING, Any

from celery.beat import Scheduler, SchedulingError
from celery.signals import setup_logging

from gym_queue import names
from gym_queue.celery_app import make_app
from gym_queue.telemetry.logging import configure
from gym_queue.telemetry.outage import Outage
from gym_queue.transport import RECONNECT

if TYPE_CHECKING:
    from celery import Celery

    from gym_queue.settings import Settings

_log = logging.getLogger(__name__)


class Timetable(Scheduler):
    """Sends what is due. What a broker does not take is not sent later: the next is soon due."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._outage = Outage(_log, "the broker")
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
            self._outage.goes_on(error)
        else:
            self._outage.is_over()

    def _sign(self, producer: Any) -> None:
        """Leave word that beat is at work, for ``gym-queue doctor``."""
        redis = producer.channel.client
        redis.set(names.beat_key(), platform.node(), ex=names.BEAT_REMEMBERED)


def make_beat(settings: Settings, timetable: dict[str, Any]) -> Celery:
    """Return the app of ``celery beat``. ``timetable`` is in Celery's own form."""
    app = make_app("beat", settings)
    app.conf.update(beat_schedule=timetable, beat_scheduler=f"{__name__}:{Timetable.__qualname__}")
    setup_logging.connect(partial(_configure_logging, settings), weak=False)
    return app


def _configure_logging(settings: Settings, **_: Any) -> None:
    configure(settings.log_level, "beat")
