"""Hands tickets to the broker where nothing may be held up by it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gym_queue.errors import BrokerError
from gym_queue.records import Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.ledger.base import Ledger
    from gym_queue.pipeline import Publisher
    from gym_queue.records import Ticket

_log = logging.getLogger(__name__)


_MOST_TICKETS = 100_000


async def offer_waiting(ledger: Ledger, publisher: Publisher, run_id: str) -> int:
    """Publish again what waits of a run that goes on: while it was paused, workers refused and forgot its
    tickets. Returns how many.
    """
    _, waiting = await ledger.waiting(Stage.GENERATE, 0.0, _MOST_TICKETS)
    return await offer(publisher, [ticket for ticket in waiting if ticket.run_id == run_id])


async def offer(publisher: Publisher, tickets: Sequence[Ticket]) -> int:
    """Publish tickets; return how many. None if the broker is away: the next audit finds them waiting."""
    if not tickets:
        return 0
    try:
        await publisher.publish(tickets)
    except BrokerError as error:
        _log.warning("%d tickets are left to the next audit: %s", len(tickets), error)
        return 0
    return len(tickets)
