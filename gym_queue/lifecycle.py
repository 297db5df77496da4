"""The states of a rollout, its legal moves, and what to do after a failure. Pure functions: no clock, no I/O.

``docs/state_machine.md`` shows the same as a picture.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TYPE_CHECKING

from gym_queue.records import FailureClass, Stage

if TYPE_CHECKING:
    from gym_queue.records import Limits


class RolloutState(StrEnum):
    """Where one rollout stands."""

    QUEUED = "queued"
    GENERATING = "generating"
    VERIFY_QUEUED = "verify_queued"
    VERIFYING = "verifying"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({RolloutState.SUCCEEDED, RolloutState.FAILED, RolloutState.CANCELLED})

WAITING_STATE = {Stage.GENERATE: RolloutState.QUEUED, Stage.VERIFY: RolloutState.VERIFY_QUEUED}
RUNNING_STATE = {Stage.GENERATE: RolloutState.GENERATING, Stage.VERIFY: RolloutState.VERIFYING}

MOVES: dict[RolloutState, frozenset[RolloutState]] = {
    RolloutState.QUEUED: frozenset({RolloutState.GENERATING, RolloutState.FAILED, RolloutState.CANCELLED}),
    RolloutState.GENERATING: frozenset(
        {
            RolloutState.QUEUED,
            RolloutState.VERIFY_QUEUED,
            RolloutState.SUCCEEDED,
            RolloutState.FAILED,
            RolloutState.CANCELLED,
        }
    ),
    RolloutState.VERIFY_QUEUED: frozenset(
        {RolloutState.VERIFYING, RolloutState.FAILED, RolloutState.CANCELLED}
    ),
    RolloutState.VERIFYING: frozenset(
        {RolloutState.VERIFY_QUEUED, RolloutState.SUCCEEDED, RolloutState.FAILED, RolloutState.CANCELLED}
    ),
    RolloutState.SUCCEEDED: frozenset(),
    RolloutState.FAILED: frozenset(),
    RolloutState.CANCELLED: frozenset(),
}

RETRYABLE = frozenset({FailureClass.INFRASTRUCTURE})
"""Classes worth another attempt. The rest would fail again the same way, or were given their full time
already.
"""

_LARGEST_EXPONENT = 60
"""Doubling longer reaches no delay that anybody waits for, and at last no number."""


def retry_delay(
    failure_class: FailureClass, failures: int, limits: Limits, *, jitter: float = 1.0
) -> float | None:
    """Decide what follows a failed attempt.

    Args:
        failure_class: class of the failure that just happened.
        failures: failed attempts of this stage so far, this one included.
        limits: the run's limits.
        jitter: factor in [0, 1] on the delay; "full jitter" spreads retries that failed together
            (M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015).

    Returns:
        Seconds to wait before the next attempt, or ``None`` when the rollout ends as failed.
    """
    if failure_class not in RETRYABLE or failures >= limits.max_attempts:
        return None
    ceiling = min(
        limits.retry_max_delay, limits.retry_base_delay * 2.0 ** min(failures - 1, _LARGEST_EXPONENT)
    )
    return ceiling * jitter


def companions(losses: int, slots: int, limits: Limits) -> int | None:
    """Return how many rollouts with as many losses may run in one worker at once.

    A worker that dies takes all its rollouts along, and one of them may be why. Nobody is suspected before
    ``max_attempts - 1`` workers have died with a rollout. From then on few run at a time, so that the next
    death has few suspects; and from ``max_attempts`` on a rollout runs alone in its worker.

    Returns:
        ``None``: as many as there are slots. 1: this one and nothing else, whatever its losses.
    """
    if losses >= limits.max_attempts:
        return 1
    if losses and losses >= limits.max_attempts - 1:
        return max(2, math.isqrt(slots))
    return None


def is_poison(losses: int, limits: Limits, *, alone: bool) -> bool:
    """Tell whether a rollout is failed for the deaths of its workers.

    Args:
        losses: workers that died with it, the last one included.
        limits: the run's limits.
        alone: it was all that the last of them had: nothing else can be to blame.

    The second limit is a backstop, for workers that do not know how to run one rollout alone.
    """
    if limits.max_attempts == 1:
        return True
    return losses >= limits.max_attempts * (1 if alone else 2)
