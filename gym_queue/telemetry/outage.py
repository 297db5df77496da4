"""What a process says of something that it cannot reach: once that it is away, once that it is back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging


class Outage:
    """One thing that may be away, and the log that is told.

    Args:
        log: who says it.
        what: the thing, as the sentences name it.
    """

    def __init__(self, log: logging.Logger, what: str) -> None:
        self._log = log
        self._what = what
        self._since: float | None = None

    def goes_on(self, error: BaseException) -> None:
        """It is away; say so if that is news."""
        if self._since is None:
            self._since = time.monotonic()
            self._log.warning("%s cannot be used, trying again until it can: %s", self._what, error)

    def is_over(self) -> None:
        """It is there; say so if that is news."""
        if self._since is not None:
            away, self._since = time.monotonic() - self._since, None
            self._log.warning("%s can be used again, after %.1f s", self._what, away)
