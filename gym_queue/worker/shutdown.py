"""How often this process was told to end: the first time it lets its work finish, the second time it hurries.

A counter, not an event: it is written inside a signal handler, where taking a lock may deadlock.
"""

from __future__ import annotations

from typing import Any

from celery.signals import worker_shutting_down

_times = 0


@worker_shutting_down.connect
def _told(**_: Any) -> None:
    global _times  # noqa: PLW0603 - signals are the process's, and so is what they say
    _times += 1


def is_under_way() -> bool:
    """Return whether this process was told to end."""
    return _times > 0


def is_urgent() -> bool:
    """Return whether what still runs is to be handed back at once."""
    return _times > 1
