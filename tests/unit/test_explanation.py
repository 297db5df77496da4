"""What ``gym-queue why`` says, case by case: records in, one sentence out (G7)."""

from __future__ import annotations

from typing import Any

import pytest

from gym_queue.cli.explanation import Pace, Scene, explain, explain_row, free_slots
from gym_queue.ledger.base import Lease, Whereabouts
from gym_queue.lifecycle import RolloutState
from gym_queue.output import FailedRow, SucceededRow
from gym_queue.records import FailureClass, Limits, RunSpec, RunState, RunStatus, Stage, Timings, Usage

NOW = 1_000_000.0
LIMITS = Limits(
    queue_timeout=86_400.0, generate_timeout=600.0, verify_timeout=120.0, rollout_timeout=172_800.0
)
PACE = Pace(heartbeat_interval=10.0, worker_timeout=300.0, sweep_interval=15.0)
GPU, CPU = "gpu-node-1-a", "cpu-node-2-b"


def lease(worker: str = GPU, age: float = 3.0, slots: int = 4, used: int | str = 4) -> Lease:
    info = {"kind": worker[:3], "slots": str(slots), "used": str(used)}
    return Lease(worker=worker, age=age, info=info)


def where(state: str, since: float = 12.0, **changes: Any) -> Whereabouts:
    """Return whereabouts whose state began ``since`` seconds ago, of a rollout accepted a minute before."""
    attempt = changes.pop("attempt", 1)
    facts = {"accepted_at": NOW - since - 60.0, "failures": attempt - 1} | changes
    return Whereabouts(state=RolloutState(state), attempt=attempt, since=NOW - since, seen_at=NOW, **facts)


def said(
    whereabouts: Whereabouts | None,
    *leases: Lease,
    run: dict[str, Any] | None = None,
    place: tuple[int, int] = (5, 0),
    **scene: Any,
) -> str:
    spec = RunSpec(run_id="run-1", model="stub:", samples=4, limits=LIMITS)
    facts: dict[str, Any] = {"spec": spec, "state": RunState.OPEN, "cursor": 20} | (run or {})
    example_index, sample_index = place
    return explain(
        Scene(
            example_index=example_index,
            sample_index=sample_index,
            run=RunStatus(**facts),
            whereabouts=whereabouts,
            leases=leases,
            pace=PACE,
            window=1024,
            **scene,
        )
    )


# --- waiting for a worker ---------------------------------------------------------------------------------


def test_queued_behind_others() -> None:
    assert said(where("queued", ahead=37), lease()) == (
        "queued for 12 s (attempt 1): waits for a GPU worker with a free slot, 37 tickets are ahead; "
        "it is failed as timeout in 23 h 59 min if none takes it"
    )


def test_one_ahead_is_one() -> None:
    assert "1 ticket is ahead;" in said(where("queued", ahead=1), lease())


def test_queued_though_there_is_room() -> None:
    assert said(where("queued", ahead=2), lease(used=1), lease(slots=8)) == (
        "queued for 12 s (attempt 1): waits for a GPU worker to take it, 2 tickets are ahead and 7 slots "
        "are free; should its ticket be lost, the sweep (every 15 s) sends it again; "
        "it is failed as timeout in 23 h 59 min if none takes it"
    )


def test_slots_that_are_wanted_by_those_ahead_are_not_free() -> None:
    assert "with a free slot" in said(where("queued", ahead=3), lease(used=1))


def test_what_a_worker_said_before_the_rollout_was_queued_is_old() -> None:
    assert said(where("queued", 2.0), lease(age=2.5, used=0)).startswith(
        "queued for 2 s (attempt 1): waits for a GPU worker with a free slot, no ticket has waited longer; "
    )


def test_queued_for_verification() -> None:
    sentence = said(where("verify_queued", ahead=2), lease(), lease(CPU, used="", slots=2))
    assert sentence.startswith(
        "verify_queued for 12 s (attempt 1): waits for a CPU worker with a free slot, 2 tickets are ahead; "
    )


@pytest.mark.parametrize(("state", "kind"), [("queued", "gpu"), ("verify_queued", "cpu")])
def test_nobody_there_to_take_it(state: str, kind: str) -> None:
    other = lease(CPU if kind == "gpu" else GPU)
    assert (
        f"(attempt 1): no {kind.upper()} worker is alive; start one with celery -A workers.{kind} worker; "
        "it is failed as timeout in 23 h 59 min if none takes it"
    ) in said(where(state), other)


def test_all_workers_are_silent() -> None:
    sentence = said(where("queued"), lease(age=90.0, used=0), lease(age=26.0, used=0), lease(CPU))
    assert "no GPU worker is alive (the last one to be heard of has been silent for 26 s)" in sentence


def test_a_worker_that_missed_one_heartbeat_is_alive() -> None:
    assert "is alive" not in said(where("queued"), lease(age=24.0))


@pytest.mark.parametrize(
    ("since", "accepted", "left"),
    [
        (3600.0, 3700.0, "it is failed as timeout in 23 h if none takes it"),
        (3600.0, 172_700.0, "it is failed as timeout in 1 min 40 s if none takes it"),
        (86_401.0, 86_500.0, "its time is over, so the next sweep fails it as timeout"),
        (10.0, 172_801.0, "its time is over, so the next sweep fails it as timeout"),
    ],
)
def test_the_wait_has_an_end(since: float, accepted: float, left: str) -> None:
    sentence = said(where("queued", since, accepted_at=NOW - accepted), lease())
    assert sentence.endswith(f"; {left}")


def test_its_time_starts_anew_when_its_run_is_opened() -> None:
    opened = {"opened_at": NOW - 60.0}
    sentence = said(where("queued", 86_390.0, accepted_at=NOW - 172_000.0), lease(), run=opened)
    assert sentence.endswith("; it is failed as timeout in 23 h 59 min if none takes it")
    sentence = said(where("generating", 40.0, worker=GPU, accepted_at=NOW - 172_795.0), lease(), run=opened)
    assert "; deadline in 9 min 20 s, then" in sentence


def test_a_retry_says_why() -> None:
    sentence = said(where("queued", attempt=3, reason="connection\nrefused"), lease())
    assert sentence.startswith("queued for 12 s (attempt 3)")
    assert sentence.endswith("; attempt 2 ended: connection refused")


def test_a_retry_nobody_gave_a_reason_for() -> None:
    assert said(where("queued", attempt=2), lease()).endswith("attempt 1 ended: the ledger does not know why")


def test_a_delayed_retry() -> None:
    assert said(where("queued", -3.24, attempt=3, reason="connection refused"), lease()) == (
        "waits 3.2 s more before attempt 3 (attempt 2 ended: connection refused)"
    )


def test_a_paused_run_holds_what_is_queued() -> None:
    paused = {"state": RunState.PAUSED}
    held = "the run is paused, and nothing new starts until gym-queue runs resume"
    assert said(where("queued"), lease(), run=paused) == (f"queued for 12 s (attempt 1): {held}")
    assert said(where("queued", -3.0, attempt=2, reason="x"), lease(), run=paused).endswith(f"; {held}")


def test_a_paused_run_goes_on_verifying() -> None:
    sentence = said(where("verify_queued"), lease(CPU), run={"state": RunState.PAUSED})
    assert "waits for a CPU worker" in sentence
    assert "paused" not in sentence
    assert "it is failed as timeout" not in sentence, "nothing of a paused run expires"


@pytest.mark.parametrize("state", ["queued", "verify_queued"])
def test_a_cancelled_run_ends_what_waits(state: str) -> None:
    assert said(where(state), lease(), run={"state": RunState.CANCELLED}) == (
        f"{state} for 12 s (attempt 1): the run is cancelled, and this rollout with it: "
        "the next sweep ends what is still open"
    )


# --- in a worker's hands ----------------------------------------------------------------------------------


def test_generating() -> None:
    reason = "worker gpu-old died"
    sentence = said(where("generating", 40.0, worker=GPU, attempt=2, reason=reason), lease(), lease(CPU))
    assert sentence == (
        f"generating for 40 s (attempt 2) on {GPU}, whose last heartbeat was 3 s ago; "
        "deadline in 9 min 20 s, then it is failed as timeout; attempt 1 ended: worker gpu-old died"
    )


def test_verifying_has_its_own_deadline() -> None:
    assert said(where("verifying", 40.0, worker=CPU), lease(CPU)) == (
        f"verifying for 40 s (attempt 1) on {CPU}, whose last heartbeat was 3 s ago; "
        "deadline in 1 min 20 s, then it is failed as timeout"
    )


def test_the_whole_may_end_before_the_stage() -> None:
    sentence = said(where("generating", 40.0, worker=GPU, accepted_at=NOW - 172_795.0), lease())
    assert sentence.endswith("deadline in 5 s, then it is failed as timeout")


def test_past_its_deadline_while_the_claim_stands() -> None:
    sentence = said(where("generating", 612.0, worker=GPU, deadline=NOW + 48.0), lease())
    assert sentence.endswith(
        "; its time for that was over 12 s ago: its worker verifies or stores it, "
        "or a sweep fails it as timeout in 48 s"
    )


@pytest.mark.parametrize("deadline", [NOW - 2.0, None])
def test_past_every_deadline(deadline: float | None) -> None:
    sentence = said(where("generating", 680.0, worker=GPU, deadline=deadline), lease())
    assert sentence.endswith(
        "; its time for that was over 1 min 20 s ago: the next sweep fails it as timeout"
    )


def test_its_worker_is_silent() -> None:
    assert said(where("generating", 60.0, worker=GPU), lease(age=45.0)) == (
        f"generating for 1 min (attempt 1) on {GPU}, which has been silent for 45 s; "
        "it is given up at 5 min and the rollout runs elsewhere"
    )


def test_its_worker_is_dead_and_not_yet_reaped() -> None:
    assert said(where("generating", 400.0, worker=GPU), lease(age=301.0)) == (
        f"generating for 6 min 40 s (attempt 1) on {GPU}, which has been silent for 5 min 1 s: "
        "the next sweep gives it up and the rollout runs elsewhere"
    )


def test_its_worker_is_gone() -> None:
    assert said(where("generating", 4.0, worker=GPU), lease("gpu-other")) == (
        f"generating for 4 s (attempt 1) on {GPU}, which has no lease any more; "
        "the rollout runs elsewhere as soon as its work is handed back"
    )


def test_a_cancelled_run_stops_its_workers() -> None:
    sentence = said(where("generating", worker=GPU), lease(), run={"state": RunState.CANCELLED})
    assert sentence.endswith("3 s ago; the run is cancelled, so its worker is told to stop")


# --- not accepted -----------------------------------------------------------------------------------------


def test_it_is_not_its_turn() -> None:
    assert said(None, place=(300, 0), run={"accepted": 1020, "archived": 5}, examples=5000) == (
        "not accepted yet: the run's cursor is at example 20 of 5,000, and 1,015 of its rollouts are "
        "accepted and not yet archived, in a window of 1,024 for all runs; it is accepted as room appears"
    )
    assert "example 20, and 0 of its rollouts" in said(None, place=(300, 0), coordinated=True)


def test_nobody_feeds_the_run() -> None:
    assert said(None, coordinated=False).endswith(
        "and no coordinator is at work on it: go on with submit-rollouts … --resume"
    )


def test_a_run_that_is_held_accepts_nothing() -> None:
    assert said(None, run={"state": RunState.PAUSED}, coordinated=False).endswith(
        ", and the run is paused, and nothing new starts until gym-queue runs resume"
    )
    assert ", and the run is cancelled" in said(None, run={"state": RunState.CANCELLED})


# --- ended ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled"])
def test_an_ended_sample_of_an_open_group(state: str) -> None:
    assert said(where(state, attempt=0)) == f"{state}: it has ended, and its row is on its way to the output"


COMMON: dict[str, Any] = {
    "run_id": "run-1",
    "rollout_id": "run-1.5.0",
    "example_id": "e5",
    "example_index": 5,
    "sample_index": 0,
    "environment": "rows",
    "model": "stub:",
    "messages": (),
    "trajectory": None,
    "finish_reason": "stop",
    "usage": Usage(),
    "timings": Timings(accepted_at=100.0, ended_at=175.0),
}


@pytest.mark.parametrize(("reward", "words"), [(0.5, "reward 0.5"), (None, "no reward asked for")])
def test_a_row_that_succeeded(reward: float | None, words: str) -> None:
    row = SucceededRow(**COMMON, attempt=2, reward=reward)
    assert explain_row(row, "its row is in out.jsonl") == (
        f"ended: succeeded 1 min 15 s after it was accepted (attempt 2, {words}); its row is in out.jsonl"
    )


def test_a_row_that_failed() -> None:
    failure: dict[str, Any] = {"class": FailureClass.VERIFIER, "stage": Stage.VERIFY, "error": "no\nidea"}
    row = FailedRow(**COMMON, **failure, attempt=1, state="failed")
    assert explain_row(row, "HERE") == (
        "ended: failed 1 min 15 s after it was accepted (attempt 1, verifier at verify: no idea); HERE"
    )


def test_a_row_that_was_cancelled() -> None:
    reason: dict[str, Any] = {"class": None, "stage": None, "error": "gym-queue cancel"}
    row = FailedRow(**COMMON, **reason, attempt=0, state="cancelled")
    assert explain_row(row, "HERE") == (
        "ended: cancelled 1 min 15 s after it was accepted (gym-queue cancel); HERE"
    )


def test_every_state_has_a_sentence() -> None:
    for state in RolloutState:
        assert said(where(state, worker=GPU), lease())


@pytest.mark.parametrize(
    ("info", "free"),
    [
        ({"slots": "8", "used": "3"}, 5),
        ({"slots": "8", "used": "9"}, 0),
        ({"slots": "8", "used": ""}, None),
        ({}, None),
    ],
)
def test_free_slots(info: dict[str, str], free: int | None) -> None:
    assert free_slots(Lease(worker="w", age=0.0, info=info)) == free
