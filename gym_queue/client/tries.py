"""How often and how long the head is asked again when it did not answer."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gym_queue.errors import GymQueueError

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0
_LONGEST_REQUEST = 60.0
"""Seconds: more than this we do not wait, whatever a ``Retry-After`` asks for."""


class AgainError(Exception):
    """The same request may be answered in a moment.

    Args:
        error: what the caller gets when patience is at an end.
        after: seconds that the head asked us to wait.
        is_failure: the head is there and failed: that is not waited out for ever.
    """

    def __init__(self, error: GymQueueError, *, after: float = 0.0, is_failure: bool = False) -> None:
        super().__init__(str(error))
        self.error = error
        self.after = after
        self.is_failure = is_failure


class Tries:
    """Tries of one thing, with pauses that grow between them.

    Args:
        patience: seconds until it is given up, from now on; after ``succeeded``, from the next failure on.
        forever: a head that is away is waited for without end.
    """

    def __init__(self, patience: float, *, forever: bool) -> None:
        self._patience = patience
        self.forever = forever
        self._since: float | None = time.monotonic()
        self._pause = _FIRST_PAUSE

    @property
    def left(self) -> float:
        """Seconds of patience that are left."""
        if self._since is None:
            return self._patience
        return max(0.0, self._patience - (time.monotonic() - self._since))

    def succeeded(self) -> None:
        """Take note that the head answered: the next failure is the first one again."""
        self._since = None
        self._pause = _FIRST_PAUSE

    async def pause(self, again: AgainError) -> None:
        """Wait until it is time for the next try.

        Raises:
            GymQueueError: patience is at an end.
        """
        if self._since is None:
            self._since = time.monotonic()
        pause = min(again.after, _LONGEST_REQUEST) + self._pause * random.uniform(0.5, 1.0)
        if (again.is_failure or not self.forever) and pause > self.left:
            raise again.error from again
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        await asyncio.sleep(pause)
