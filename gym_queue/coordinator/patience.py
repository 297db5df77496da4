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
    """Repeat a call that is safe to repeat until ledger and broker answer. The ledger says for itself that it
    is away; of the broker it is said here, once when it begins and once when it is over.
    """
    pause, said = _FIRST_PAUSE, False
    while True:
        try:
            result = await call()
        except (LedgerError, BrokerError) as error:
            if not said and isinstance(error, BrokerError):
                _log.warning("waiting: %s", error)
                said = True
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            if said:
                _log.warning("going on: the broker answers again")
            return result
