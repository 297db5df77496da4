"""Gives the work of dead workers, and attempts past their deadline, back to the queue."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from gym_queue import endings
from gym_queue.endings import Draft, Place
from gym_queue.ledger.base import Outcome, Retry
from gym_queue.lifecycle import is_poison
from gym_queue.maintenance.publication import offer
from gym_queue.records import Failure, FailureClass, Timings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.ledger.base import Ledger, OwnedAttempt
    from gym_queue.pipeline import Publisher
    from gym_queue.records import RunSpec

_log = logging.getLogger(__name__)

_BATCH = 1000
_OVERDUE_BY = 5.0


async def reap(ledger: Ledger, publisher: Publisher, worker_timeout: float) -> int:
    """Requeue what workers silent for ``worker_timeout`` seconds own, and fail what any worker is overdue
    with.

    Returns how many attempts were taken away.
    """
    taken = 0
    for lease in await ledger.leases():
        worker = lease.worker
        if lease.age > worker_timeout:
            kind = "server" if lease.is_server else "worker"
            words = f"{kind} {worker} was silent for {lease.age:.0f} s"
            taken += await bury(ledger, publisher, worker, words)
            _log.warning("%s and is given up", words)
            continue
        # One that was not heard of since the deadline may have stood still: then it says so when it is back.
        while owned := await ledger.owned(worker, max(_OVERDUE_BY, lease.age), _BATCH):
            error = f"worker {worker} ran past the stage's deadline"
            taken += await lose(ledger, publisher, owned, FailureClass.TIMEOUT, error)
    return taken


async def bury(ledger: Ledger, publisher: Publisher, worker: str, last_words: str) -> int:
    """Take everything away from a worker that is dead, and forget it. Returns how many attempts it had.

    ``last_words`` is a sentence that names the worker and says what is known of its end.
    """
    taken, alone = 0, None
    while owned := await ledger.owned(worker, None, _BATCH):
        alone = len(owned) == 1 if alone is None else alone
        taken += await lose(ledger, publisher, owned, FailureClass.INFRASTRUCTURE, last_words, alone=alone)
    await ledger.drop_lease(worker)
    return taken


async def lose(
    ledger: Ledger,
    publisher: Publisher,
    attempts: Sequence[OwnedAttempt],
    failure_class: FailureClass,
    error: str,
    *,
    alone: bool = False,
) -> int:
    """Take attempts away from their worker: each is tried again or, if it may not be, failed. Returns how
    many.

    Args:
        ledger: where they stand.
        publisher: where the tickets of the next attempts go.
        attempts: what is taken.
        failure_class: ``INFRASTRUCTURE`` where their worker died, so that they may be tried again;
            ``TIMEOUT`` where they had their full time.
        error: one sentence.
        alone: the worker had this one attempt and nothing else, so nothing else can be why it died.
    """
    runs = {run_id: await ledger.run(run_id) for run_id in {attempt.fence.run_id for attempt in attempts}}
    receipts = await asyncio.gather(
        *(
            ledger.commit(
                attempt.fence, _outcome(status.spec, attempt, failure_class, error, alone=alone), revoke=True
            )
            for attempt in attempts
            if (status := runs[attempt.fence.run_id]) is not None
        )
    )
    await offer(publisher, [receipt.ticket for receipt in receipts if receipt.ticket is not None])
    return sum(receipt.accepted for receipt in receipts)


def _outcome(
    spec: RunSpec, attempt: OwnedAttempt, failure_class: FailureClass, error: str, *, alone: bool
) -> Outcome:
    fence = attempt.fence
    if failure_class is FailureClass.INFRASTRUCTURE:
        losses = fence.losses + 1
        if not is_poison(losses, spec.limits, alone=alone):
            return Retry(lost=True, counted=False, reason=error)
        workers = "a worker" if losses == 1 else f"{losses} workers"
        error = f"{workers} died with this rollout; the last one: {error}"
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
    failure = Failure(failure_class=failure_class, stage=fence.stage, error=error)
    return endings.failed(place, failure, fence.attempt, timings, draft)
