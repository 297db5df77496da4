"""Deletes what is kept beside the ledger for runs that it no longer knows: who forgot them died too soon."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from gym_queue.ledger.base import Ledger

_log = logging.getLogger(__name__)

_OLD = 3600.0
"""Seconds. A younger folder may belong to a run that is just being opened."""


class Payloads(Protocol):
    """What is kept beside the ledger. Both methods block, and raise ``LedgerError``."""

    def opened_before(self, age: float) -> list[str]:
        """Return the runs of this ledger that were opened at least ``age`` seconds ago."""
        ...

    def forget(self, run_id: str) -> None:
        """Delete all of a run's."""
        ...


async def prune(ledger: Ledger, payloads: Payloads | None) -> int:
    """Delete the payloads of runs that were forgotten. Returns of how many runs."""
    if payloads is None:
        return 0
    opened = await asyncio.to_thread(payloads.opened_before, _OLD)
    orphans = [run_id for run_id in opened if await ledger.run(run_id) is None]
    for run_id in orphans:
        await asyncio.to_thread(payloads.forget, run_id)
        _log.info("payloads of run %s, which nobody knows, are deleted", run_id)
    return len(orphans)
