"""Gives the work of dead workers, and attempts past their deadline, back to the queue."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING

from gym_queue import endings
from gym_queue.endings import Draft, Place
from gym_queue.ledger.base import Outcome, Retry
from gym_queue.lifecycle import retry_delay
from gym_queue.records import Failure, FailureClass, Stage, Timings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.ledger.base import Ledger, OwnedAttempt
    from gym_queue.pipeline import Publisher
    from gym_queue.records import RunSpec

_log = logging.getLogger(__name__)

_BATCH = 1000
_OVERDUE_BY = 5.0


async def reap(ledger: Ledger, publisher: Publisher, worker_timeout: float) -> int:
    """Requeue what workers silent for ``worker_timeout`` seconds own, and what any worker is overdue with.

    Returns how many attempts were taken away.
    """
    taken = 0
    for lease in await ledger.leases():
        gone = lease.age > worker_timeout
        while owned := await ledger.owned(lease.worker, None if gone else _OVERDUE_BY, _BATCH):
            if gone:
                error = f"worker {lease.worker} was silent for {lease.age:.0f} s"
                taken += await lose(ledger, publisher, owned, FailureClass.INFRASTRUCTURE, error)
            else:
                error = f"worker {lease.worker} ran past the stage's deadline"
                taken += await lose(ledger, publisher, owned, FailureClass.TIMEOUT, error)
        if gone:
            await ledger.drop_lease(lease.worker)
            _log.warning("worker %s was silent for %.0f s and is given up", lease.worker, lease.age)
    return taken


async def lose(
    ledger: Ledger,
    publisher: Publisher,
    attempts: Sequence[OwnedAttempt],
    failure_class: FailureClass,
    error: str,
) -> int:
    """Take attempts away from their worker: each is tried again or, if it may not be, failed. Returns how
    many.
    """
    runs = {run_id: await ledger.run(run_id) for run_id in {attempt.fence.run_id for attempt in attempts}}
    receipts = await asyncio.gather(
        *(
            ledger.commit(attempt.fence, _outcome(status.spec, attempt, failure_class, error))
            for attempt in attempts
            if (status := runs[attempt.fence.run_id]) is not None
        )
    )
    tickets = [receipt.ticket for receipt in receipts if receipt.ticket is not None]
    if tickets:
        await publisher.publish(tickets)
    return sum(receipt.accepted for receipt in receipts)


def _outcome(spec: RunSpec, attempt: OwnedAttempt, failure_class: FailureClass, error: str) -> Outcome:
    fence = attempt.fence
    delay = retry_delay(failure_class, attempt.failures + 1, spec.limits, jitter=random.random())
    if delay is not None:
        return Retry(delay=delay)
    place = Place(
        spec=spec,
        example=attempt.example,
        example_index=fence.example_index,
        sample_index=fence.sample_index,
    )
    draft = Draft.model_validate_json(attempt.payload) if attempt.payload else None
    timings = Timings(
        accepted_at=attempt.accepted_at,
        ended_at=attempt.seen_at,
        queued=draft.queued if draft else None,
        generate=draft.generate if draft else None,
    )
    failure = Failure(failure_class=failure_class, stage=Stage(fence.stage), error=error)
    return endings.failed(place, failure, fence.attempt, timings, draft)
