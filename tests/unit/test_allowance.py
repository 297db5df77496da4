"""How many examples may be begun, and that nobody waits for ever because of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gym_queue.api import GroupCounts
from gym_queue.coordinator.allowance import (
    dropped,
    fresh_allowance,
    smallest,
    versions_missing,
    wanted_allowance,
)
from gym_queue.records import Freshness, GroupPolicy

COUNTS = st.builds(GroupCounts, **dict.fromkeys(GroupCounts.model_fields, st.integers(0, 40)))


def test_without_a_policy_all_may_be_begun() -> None:
    assert (
        smallest(wanted_allowance(GroupPolicy(), GroupCounts()), fresh_allowance(None, GroupCounts(), 0))
        is None
    )


@given(COUNTS, st.integers(1, 60), st.integers(0, 9))
def test_each_dropped_group_makes_room_for_one(counts: GroupCounts, wanted: int, oversample: int) -> None:
    policy = GroupPolicy(wanted=wanted, oversample=oversample)
    allowed = wanted_allowance(policy, counts)
    if counts.complete >= wanted:
        assert allowed == 0, "nothing more is begun once there are enough"
    else:
        assert allowed == wanted + oversample + counts.short + counts.uniform + counts.stale


@given(st.lists(st.sampled_from(["complete", "short", "uniform", "stale"]), max_size=60), st.integers(1, 9))
def test_exactly_what_is_wanted_becomes_complete_and_no_more_is_begun(fates: list[str], wanted: int) -> None:
    """Groups end one after the other, whatever becomes of them; as many are begun as may be."""
    policy, counts, begun = GroupPolicy(wanted=wanted), GroupCounts(), 0
    for fate in [*fates, *["complete"] * wanted]:
        begun = max(begun, wanted_allowance(policy, counts) or 0)
        decided = counts.complete + dropped(counts)
        if counts.complete == wanted:
            break
        assert begun - decided == wanted - counts.complete, "open are exactly those that are still wanted"
        counts = counts.model_copy(update={fate: getattr(counts, fate) + 1})
    assert begun == wanted + dropped(counts)


def test_no_more_is_begun_than_will_be_fresh_when_its_turn_comes() -> None:
    freshness = Freshness(max_staleness=1, groups_per_version=8)
    assert fresh_allowance(freshness, GroupCounts(), 0) == 16
    assert fresh_allowance(freshness, GroupCounts(complete=8), 1) == 24
    assert fresh_allowance(Freshness(max_staleness=0, groups_per_version=8), GroupCounts(), 0) == 8


@given(st.integers(0, 5), st.integers(1, 9), COUNTS, st.integers(0, 9), st.integers(0, 400))
def test_what_is_missing_is_what_it_takes(
    staleness: int, batch: int, counts: GroupCounts, versions: int, more: int
) -> None:
    freshness = Freshness(max_staleness=staleness, groups_per_version=batch)
    begun = dropped(counts) + more
    missing = versions_missing(freshness, counts, versions, begun)
    assert (fresh_allowance(freshness, counts, versions + missing) or 0) > begun
    if missing:
        assert (fresh_allowance(freshness, counts, versions + missing - 1) or 0) <= begun


@given(st.integers(0, 3), st.integers(1, 5), st.lists(st.booleans(), max_size=40))
def test_a_trainer_gets_each_batch_though_groups_are_dropped_and_none_is_too_old(
    staleness: int, batch: int, drops: list[bool]
) -> None:
    """The trainer takes ``batch`` complete groups in the order in which they were begun, learns, and
    announces the next version. Each group is sampled by the newest weights as it is begun.
    """
    freshness = Freshness(max_staleness=staleness, groups_per_version=batch)
    counts, version, sampled_by = GroupCounts(), 0, list[int]()
    waiting = list[int]()
    fates = iter(drops)
    for _ in range(200):
        allowed = fresh_allowance(freshness, counts, version) or 0
        if len(sampled_by) < allowed:
            sampled_by.append(version)
            if next(fates, False):
                counts = counts.model_copy(update={"short": counts.short + 1})
            else:
                counts = counts.model_copy(update={"complete": counts.complete + 1})
                waiting.append(version)
        elif len(waiting) >= batch:
            taken, waiting = waiting[:batch], waiting[batch:]
            assert all(version - one <= staleness for one in taken)
            version += 1
        else:
            raise AssertionError("the trainer waits for groups, and the run for the trainer")
    assert version
