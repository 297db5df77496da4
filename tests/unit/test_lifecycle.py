"""The states of a rollout: the table of moves, its picture in the docs, and what follows a failure (G6)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gym_queue.lifecycle import (
    MOVES,
    RUNNING_STATE,
    TERMINAL,
    WAITING_STATE,
    RolloutState,
    companions,
    is_poison,
    retry_delay,
)
from gym_queue.records import FailureClass, Limits, Stage

PAGE = (Path(__file__).parents[2] / "docs" / "state_machine.md").read_text()

FOLLOWS = {
    FailureClass.INFRASTRUCTURE: "another attempt",
    FailureClass.MODEL: "failed",
    FailureClass.ENVIRONMENT: "failed",
    FailureClass.VERIFIER: "failed",
    FailureClass.TIMEOUT: "failed",
    FailureClass.STALE: "failed",
    FailureClass.INVALID: "failed",
}

limits = st.builds(
    Limits,
    max_attempts=st.integers(1, 5000),
    retry_base_delay=st.floats(0, 1e6),
    retry_max_delay=st.floats(0, 1e6),
)
classes = st.sampled_from(FailureClass)
failures = st.integers(1, 5000)
jitters = st.floats(0, 1)


def test_failure_classes_are_those_of_the_design() -> None:
    assert {str(name) for name in FailureClass} == {
        "model",
        "environment",
        "verifier",
        "timeout",
        "infrastructure",
        "stale",
        "invalid",
    }


def reachable(start: RolloutState) -> set[RolloutState]:
    found, todo = set[RolloutState](), [start]
    while todo:
        state = todo.pop()
        found.add(state)
        todo += MOVES[state] - found
    return found


def test_moves_lead_from_states_to_states() -> None:
    assert set(MOVES) == set(RolloutState)
    assert reachable(RolloutState.QUEUED) == set(RolloutState)


def test_terminal_states_and_only_they_have_no_exits() -> None:
    assert {state for state, exits in MOVES.items() if not exits} == TERMINAL


@pytest.mark.parametrize("state", set(RolloutState) - TERMINAL)
def test_every_state_has_a_way_to_each_end(state: RolloutState) -> None:
    assert reachable(state) >= TERMINAL
    assert RolloutState.CANCELLED in MOVES[state]


@pytest.mark.parametrize("stage", Stage)
def test_a_stage_waits_then_runs_and_may_wait_again(stage: Stage) -> None:
    assert RUNNING_STATE[stage] in MOVES[WAITING_STATE[stage]]
    assert WAITING_STATE[stage] in MOVES[RUNNING_STATE[stage]]


def test_the_picture_in_the_docs_shows_the_moves() -> None:
    drawn = re.findall(r"^    (\S+) --> (\S+)$", PAGE, flags=re.MULTILINE)
    assert len(drawn) == len(set(drawn))
    moves = {(str(state), str(after)) for state, exits in MOVES.items() for after in exits}
    ends = {(str(state), "[*]") for state in TERMINAL}
    assert set(drawn) == moves | ends | {("[*]", str(RolloutState.QUEUED))}


def test_the_docs_describe_each_state_and_class() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, flags=re.MULTILINE))
    assert set(rows) == {*map(str, RolloutState), *map(str, FailureClass)}
    for failure_class, follows in FOLLOWS.items():
        assert rows[failure_class].split(" | ")[1].startswith(follows)


def test_the_docs_name_each_deadline() -> None:
    rows = re.findall(r"^\| .* \| `(\w+_timeout)` \| ([\d,]+) \|", PAGE, flags=re.MULTILINE)
    said = {name: float(seconds.replace(",", "")) for name, seconds in rows}
    assert said == {name: value for name, value in Limits() if name.endswith("_timeout")}


@pytest.mark.guarantee("G6")
@pytest.mark.parametrize("failure_class", FailureClass)
def test_g6_only_infrastructure_is_tried_again(failure_class: FailureClass) -> None:
    delays = [retry_delay(failure_class, failed, Limits(max_attempts=3)) for failed in (1, 2, 3, 4)]
    if FOLLOWS[failure_class] == "failed":
        assert delays == [None] * 4
    else:
        assert delays == [1.0, 2.0, None, None]


def test_one_attempt_means_no_retry() -> None:
    assert retry_delay(FailureClass.INFRASTRUCTURE, 1, Limits(max_attempts=1)) is None


@given(classes, failures, limits, jitters)
def test_a_delay_stays_within_its_bounds(
    failure_class: FailureClass, failed: int, some: Limits, jitter: float
) -> None:
    delay = retry_delay(failure_class, failed, some, jitter=jitter)
    retried = failure_class is FailureClass.INFRASTRUCTURE and failed < some.max_attempts
    assert (delay is not None) is retried
    if delay is not None:
        assert 0 <= delay <= some.retry_max_delay
        assert failed > 1 or delay <= some.retry_base_delay


@given(failures, limits, jitters)
def test_a_later_delay_is_no_shorter(failed: int, some: Limits, jitter: float) -> None:
    first = retry_delay(FailureClass.INFRASTRUCTURE, failed, some, jitter=jitter)
    second = retry_delay(FailureClass.INFRASTRUCTURE, failed + 1, some, jitter=jitter)
    assert first is None or second is None or first <= second
    assert first is not None or second is None  # who has failed for good is not tried again


@given(failures, limits, jitters, jitters)
def test_jitter_only_shortens(failed: int, some: Limits, one: float, other: float) -> None:
    low, high = sorted([one, other])
    short = retry_delay(FailureClass.INFRASTRUCTURE, failed, some, jitter=low)
    long = retry_delay(FailureClass.INFRASTRUCTURE, failed, some, jitter=high)
    assert (short is None) is (long is None)
    assert short is None or long is None or short <= long


# --- rollouts whose workers die ---------------------------------------------------------------------------

losses = st.integers(0, 100)
slots = st.integers(1, 10_000)
few = st.builds(Limits, max_attempts=st.integers(1, 10))


def test_first_nobody_is_suspected_then_few_run_at_once_then_one_alone() -> None:
    assert [companions(lost, 256, Limits(max_attempts=3)) for lost in range(5)] == [None, None, 16, 1, 1]
    assert [companions(lost, 256, Limits(max_attempts=2)) for lost in range(4)] == [None, 16, 1, 1]
    assert companions(0, 256, Limits(max_attempts=1)) is None
    assert companions(2, 1, Limits(max_attempts=3)) == 2  # 1 would keep all others out


@given(losses, slots, few)
def test_more_losses_never_mean_more_company(lost: int, room: int, some: Limits) -> None:
    now, then = companions(lost, room, some), companions(lost + 1, room, some)
    assert now is None or (then is not None and then <= now)


def test_g6_poison_is_what_kills_its_worker_alone_after_max_attempts() -> None:
    three = Limits(max_attempts=3)
    assert [is_poison(lost, three, alone=True) for lost in (1, 2, 3, 4)] == [False, False, True, True]
    assert [is_poison(lost, three, alone=False) for lost in (3, 5, 6)] == [False, False, True]
    assert is_poison(1, Limits(max_attempts=1), alone=False)


@given(losses, slots, few)
def test_who_is_told_to_run_alone_is_poison_at_its_next_death(lost: int, room: int, some: Limits) -> None:
    """So a rollout kills ``max_attempts + 1`` workers at most, where they know the quarantine."""
    if companions(lost, room, some) == 1:
        assert is_poison(lost + 1, some, alone=True)
