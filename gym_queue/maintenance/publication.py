"""Hands tickets to the broker where nothing may be held up by it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gym_queue.errors import BrokerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.pipeline import Publisher
    from gym_queue.records import Ticket

_log = logging.getLogger(__name__)


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
