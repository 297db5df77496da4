"""How many examples of a run may be begun: as many groups as are wanted, and none that would be too old when
its turn comes. Pure functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gym_queue.api import GroupCounts
    from gym_queue.records import Freshness, GroupPolicy


def dropped(counts: GroupCounts) -> int:
    """Return how many groups are not for the trainer: each makes room for a fresh one."""
    return counts.short + counts.uniform + counts.stale


def wanted_allowance(policy: GroupPolicy, counts: GroupCounts) -> int | None:
    """Return how many examples may be begun so that ``policy.wanted`` groups are complete in the end;
    ``None``: all.

    Begun are complete, dropped and open ones: so no more than ``oversample`` are open beyond those that are
    still wanted, and each dropped one is replaced by exactly one.
    """
    if policy.wanted is None:
        return None
    if counts.complete >= policy.wanted:
        return 0
    return policy.wanted + policy.oversample + dropped(counts)


def fresh_allowance(freshness: Freshness | None, counts: GroupCounts, versions: int) -> int | None:
    """Return how many examples may be begun so that none is too old when its turn comes; ``None``: all.

    ``versions`` were announced since the run began. The rule is in ``Freshness``. Dropped groups do not
    count: the trainer never gets them, and would wait for ever for those that they kept from being begun.
    """
    if freshness is None:
        return None
    batches = versions + freshness.max_staleness + 1
    return batches * freshness.groups_per_version + dropped(counts)


def versions_missing(freshness: Freshness, counts: GroupCounts, versions: int, begun: int) -> int:
    """Return how many more versions must be announced before one more example than ``begun`` may be begun."""
    turn = (begun - dropped(counts)) // freshness.groups_per_version  # the batch that it would be in, from 0
    return max(0, turn - freshness.max_staleness - versions)


def smallest(*allowances: int | None) -> int | None:
    """Return the one that allows least; ``None``: all may be begun."""
    return min((some for some in allowances if some is not None), default=None)
