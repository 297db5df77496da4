"""Writing to a disk that may be full: what cannot be written waits for room."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from gym_queue.errors import DiskFullError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_log = logging.getLogger(__name__)

_PAUSE = 1.0
"""Seconds between two looks whether a full disk has room again."""


async def once_there_is_room(write: Callable[[], Awaitable[None]]) -> None:
    """Repeat a write, which keeps nothing where it fails, until the disk has room for it; say so once.

    Who cancels this closes the files next, so it ends when the write does (its thread cannot be stopped).
    """
    said = False
    while True:
        writing = asyncio.ensure_future(write())
        try:
            await asyncio.shield(writing)
        except DiskFullError as error:
            if not said:
                _log.warning("the run pauses: %s; it goes on by itself when there is room", error)
                said = True
            await asyncio.sleep(_PAUSE)
        except asyncio.CancelledError:
            await asyncio.gather(writing, return_exceptions=True)  # what failed counts as not written
            raise
        else:
            if said:
                _log.warning("the run goes on: there is room again")
            return
