"""Waiting out a store that is away: a coordinator has nothing better to do, and must lose nothing."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING, TypeVar

from gym_queue.errors import BrokerError, LedgerError
from gym_queue.telemetry.outage import Outage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0

_broker = Outage(_log, "the broker")


async def patiently(call: Callable[[], Awaitable[_Result]]) -> _Result:
    """Repeat a call that is safe to repeat until ledger and broker answer.

    The ledger says for itself that it is away. Of the broker, which is the same Redis, it is said here, once
    for all who wait, when it stays away.
    """
    pause = _FIRST_PAUSE
    while True:
        try:
            result = await call()
        except (LedgerError, BrokerError) as error:
            if isinstance(error, BrokerError) and pause >= _LONGEST_PAUSE:
                _broker.goes_on(error)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            if pause >= _LONGEST_PAUSE:
                _broker.is_over()
            return result
