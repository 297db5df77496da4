"""An office of the ledger, held by one process of several: what must be done once is done by its holder."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from gym_queue.errors import LedgerError

if TYPE_CHECKING:
    from gym_queue.ledger.base import Ledger

_log = logging.getLogger(__name__)

TERM = 5.0
INTERVAL = 1.0
_AGAIN = 0.1
_LAST_CALL = 2.0
"""Seconds that a process which ends takes to say so."""


class Office:
    """One office, seen by one process that wants it.

    Args:
        ledger: says who holds it.
        name: of the office.
        holder: of this process; no other has the same.
        term: seconds after which an office is free that was not renewed.
        interval: seconds between two renewals, or between two looks whether it is free.
    """

    def __init__(
        self, ledger: Ledger, name: str, holder: str, *, term: float = TERM, interval: float = INTERVAL
    ) -> None:
        self._ledger = ledger
        self._name = name
        self._holder = holder
        self._term = term
        self._interval = interval
        self._until = 0.0

    async def take(self) -> None:
        """Wait until the office is ours."""
        said = False
        while True:
            try:
                if await self._ask():
                    return
                if not said:
                    said = True
                    _log.info("another leads; this process waits for its turn")
            except LedgerError as error:  # which says so itself
                _log.debug("nobody can take an office now: %s", error)
            await asyncio.sleep(self._interval)

    async def hold(self) -> str:
        """Renew the office as long as that is possible. Returns why it is not ours any more.

        The term counts from before the ledger was asked, so it is over here before it is over there.
        """
        while True:
            await asyncio.sleep(self._interval)
            try:
                async with asyncio.timeout_at(self._until):
                    if not await self._renewed():
                        return "another head leads now"
            except TimeoutError:
                return f"the ledger did not renew the office within {self._term:g} s"

    async def resign(self) -> None:
        """Give the office back if it is ours, so that another may have it at once; at least try to."""
        try:
            async with asyncio.timeout(_LAST_CALL):
                await self._ledger.resign(self._name, self._holder)
        except (LedgerError, TimeoutError) as error:  # its term ends all the same
            _log.info("the office stays taken for up to %g s: %s", self._term, error)

    async def _renewed(self) -> bool:
        while True:
            try:
                return await self._ask()
            except LedgerError:
                await asyncio.sleep(_AGAIN)

    async def _ask(self) -> bool:
        asked = asyncio.get_running_loop().time()
        if not await self._ledger.lead(self._name, self._holder, self._term):
            return False
        self._until = asked + self._term
        return True
