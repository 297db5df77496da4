"""Celery's consumer, for a broker that comes and goes: it connects again soon, and says so once."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

from celery.exceptions import CPendingDeprecationWarning
from celery.worker.consumer import Consumer
from celery.worker.consumer.consumer import CONNECTION_RETRY
from celery.worker.state import maybe_shutdown

from gym_queue.telemetry.outage import Outage
from gym_queue.transport import RECONNECT

_log = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
"""Seconds between two connections that did not last."""

_SETTLED = 2.0
"""Seconds after which a connection counts as one that works: one that takes no writes can be made, too."""


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether Celery's line says more than ``Outage`` does."""
    sentence = record.getMessage()
    return not sentence.startswith((CONNECTION_RETRY, "Frequent restarts"))


logging.getLogger("celery.worker.consumer.consumer").addFilter(_is_news)

# To go on with tickets in hand after a connection was lost is our choice; Celery would warn of it each time.
warnings.filterwarnings("ignore", category=CPendingDeprecationWarning, module=__name__)


class PatientConsumer(Consumer):
    """Celery's, without its chatter between workers, which costs each of them a message of all others."""

    def __init__(self, *args: Any, worker_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        quiet = {"without_gossip": True, "without_mingle": True}
        self._outage = Outage(_log, "the broker")
        self._pause = _FIRST_PAUSE
        self._connected_at = 0.0
        super().__init__(*args, worker_options=(worker_options or {}) | quiet, **kwargs)

    @property
    def is_connected(self) -> bool:
        """Whether the broker was there when it was last heard of. Any thread may ask."""
        return self._connected_at > 0.0

    def ensure_connected(self, conn: Any) -> Any:
        """Connect, however long it takes; a shutdown ends it."""
        conn.ensure_connection(
            lambda error, _interval: self._outage.goes_on(error),
            callback=maybe_shutdown,
            **RECONNECT,
        )
        self.first_connection_attempt = False
        self._connected_at = time.monotonic()
        return conn

    def on_ready(self) -> None:
        """All is declared and the event loop starts."""
        super().on_ready()
        self.timer.call_after(_SETTLED, self._settle, (self._connected_at,))

    def _settle(self, connected_at: float) -> None:
        if connected_at == self._connected_at:  # it is still the same connection
            self._outage.is_over()

    def on_connection_error_before_connected(self, exc: BaseException) -> None:
        """There is no connection yet to be forgotten."""
        self._wait(exc)

    def on_connection_error_after_connected(self, exc: BaseException) -> None:
        """Forget the connection.

        The tickets that it brought are worked on all the same: to put them back would only make more of them.
        """
        for channel in list(self.connection.transport.channels):
            channel.do_restore = False
        super().on_connection_error_after_connected(exc)
        self._wait(exc)

    def _wait(self, exc: BaseException) -> None:
        """Wait a moment, and longer each time if the connections do not last."""
        self._outage.goes_on(exc)
        lasted = time.monotonic() - self._connected_at > _SETTLED
        self._connected_at = 0.0
        self._pause = _FIRST_PAUSE if lasted else min(2 * self._pause, _LONGEST_PAUSE)
        time.sleep(self._pause)
        maybe_shutdown()
