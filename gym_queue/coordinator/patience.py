"""Waiting out a store that is away: a coordinator has nothing better to do, and must lose nothing."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING, TypeVar

from gym_queue.errors import BrokerError, LedgerError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0


async def patiently(call: Callable[[], Awaitable[_Result]]) -> _Result:
    """Repeat a call that is safe to repeat until ledger and broker answer.

    Silently: many wait at once, and ledger and broker say themselves, once, that they are away.
    """
    pause = _FIRST_PAUSE
    while True:
        try:
            return await call()
        except (LedgerError, BrokerError) as error:
            _log.debug("waiting: %s", error)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)
