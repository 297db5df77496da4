"""Ends rollouts that have waited for a worker, or lasted, longer than their run allows (G7).

Deadlines of stages are kept by the workers themselves. A run that is paused waits for a person, so nothing of
it expires; and when it is opened again, its rollouts have their full time again.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from gym_queue import endings
from gym_queue.endings import Place
from gym_queue.lifecycle import RUNNING_STATE, WAITING_STATE
from gym_queue.records import Failure, FailureClass, RunState, Stage, Timings, rollout_id

if TYPE_CHECKING:
    from gym_queue.ledger.base import Ended, Ledger, OpenRollout
    from gym_queue.records import RunStatus

_log = logging.getLogger(__name__)

_GROWTH = 8
_WAITING = frozenset(WAITING_STATE.values())
_STAGE = {state[stage]: stage for stage in Stage for state in (WAITING_STATE, RUNNING_STATE)}


async def expire(ledger: Ledger) -> int:
    """End what is too old. Returns how many rollouts were ended."""
    return sum(
        [await _expire_run(ledger, status) for status in await ledger.runs() if status.state is RunState.OPEN]
    )


async def _expire_run(ledger: Ledger, status: RunStatus) -> int:
    """Look at the rollouts that were accepted first: at one and, while all seen are old, at ever more."""
    limits, run_id = status.spec.limits, status.spec.run_id
    ended, limit = 0, 1
    while True:
        rollouts = await ledger.open_rollouts(run_id, limit)
        ended += sum(await asyncio.gather(*(_expire_one(ledger, status, rollout) for rollout in rollouts)))
        youngest = _age(status, rollouts[-1]) if len(rollouts) == limit else 0.0
        if youngest <= min(limits.queue_timeout, limits.rollout_timeout):
            return ended
        limit *= _GROWTH


async def _expire_one(ledger: Ledger, status: RunStatus, rollout: OpenRollout) -> bool:
    limits, run_id = status.spec.limits, status.spec.run_id
    waited = rollout.seen_at - max(rollout.since, status.opened_at)
    if _age(status, rollout) > limits.rollout_timeout:
        error = f"it was not done {limits.rollout_timeout:g} s (rollout_timeout) after it was accepted"
        done = await ledger.end(run_id, _failed(status, rollout, error))
    elif rollout.state in _WAITING and waited > limits.queue_timeout:
        error = f"no worker took it within {limits.queue_timeout:g} s (queue_timeout)"
        ended = _failed(status, rollout, error)
        done = await ledger.end(run_id, ended, waiting_attempt=rollout.attempt)
    else:
        return False
    if done:
        name = rollout_id(run_id, rollout.example_index, rollout.sample_index)
        _log.info("rollout %s is failed: %s", name, error)
    return done


def _age(status: RunStatus, rollout: OpenRollout) -> float:
    return rollout.seen_at - max(rollout.accepted_at, status.opened_at)


def _failed(status: RunStatus, rollout: OpenRollout, error: str) -> Ended:
    place = Place(
        spec=status.spec,
        example=rollout.example,
        example_index=rollout.example_index,
        sample_index=rollout.sample_index,
    )
    failure = Failure(failure_class=FailureClass.TIMEOUT, stage=_STAGE[rollout.state], error=error)
    timings = Timings(accepted_at=rollout.accepted_at, ended_at=rollout.seen_at)
    return endings.failed(place, failure, rollout.attempt, timings)
