"""What a worker counts: each attempt once, in whichever process it ran."""

from __future__ import annotations

import os

import pytest

from gym_queue.records import Fence, Stage, Summary, Timings, Usage
from gym_queue.telemetry import catalogue
from gym_queue.telemetry.meter import BOUNDS, LATENCIES, OUTCOMES, Meter
from gym_queue.telemetry.story import Step, Story, about, spent, step
from tests.unit.prometheus import shown

SECONDS = "gym_queue_worker_stage_seconds"


def story(stage: Stage = Stage.GENERATE, outcome: str = "generated", waited: float = 2.0) -> Story:
    fence = Fence(stage=stage, run_id="run", example_index=0, sample_index=0, attempt=1, worker="me")
    told = Story(fence=fence, accepted_at=100.0, queued_at=110.0, claimed_at=110.0 + waited)
    told.outcome = outcome
    return told


def ended(told: Story, state: str) -> Story:
    told.outcome = state
    timings = Timings(accepted_at=100.0, ended_at=140.0)
    told.summary = Summary.model_validate(
        {"example_index": 0, "sample_index": 0, "attempt": 1, "state": state, "timings": timings}
    )
    return told


def test_an_attempt_is_counted_by_stage_outcome_and_latency() -> None:
    meter = Meter()
    told = story()
    told.steps += [Step("reset", 0.0, 0.5, ""), Step("generating", 0.0, 7.0, "")]
    told.usage = Usage(prompt_tokens=10, completion_tokens=32)
    meter.observe(told)
    numbers = shown(meter.families())
    assert numbers["gym_queue_worker_attempts_total{outcome=generated,stage=generate}"] == 1
    assert numbers["gym_queue_worker_tokens_total{kind=prompt}"] == 10
    assert numbers["gym_queue_worker_tokens_total{kind=completion}"] == 32
    assert numbers[f"{SECONDS}_sum{{stage=queued}}"] == 2.0
    assert numbers[f"{SECONDS}_sum{{stage=generate}}"] == 7.0
    assert numbers[f"{SECONDS}_bucket{{le=5,stage=generate}}"] == 0
    assert numbers[f"{SECONDS}_bucket{{le=10,stage=generate}}"] == 1
    assert numbers[f"{SECONDS}_count{{stage=verify}}"] == numbers[f"{SECONDS}_count{{stage=total}}"] == 0


def test_a_verified_rollout_is_counted_with_its_whole_length() -> None:
    meter = Meter()
    told = ended(story(Stage.VERIFY, waited=0.2), "succeeded")
    told.steps.append(Step("verifying", 1.0, 1.5, ""))
    meter.observe(told)
    numbers = shown(meter.families())
    sums = {stage: numbers[f"{SECONDS}_sum{{stage={stage}}}"] for stage in LATENCIES}
    assert sums == pytest.approx(
        {"queued": 0.0, "generate": 0.0, "verify_queued": 0.2, "verify": 0.5, "total": 40.0}
    )
    assert numbers["gym_queue_worker_attempts_total{outcome=succeeded,stage=verify}"] == 1


def test_a_stage_that_failed_and_an_end_that_was_refused_have_no_latency() -> None:
    meter = Meter()
    failed = ended(story(), "failed")
    failed.steps.append(Step("generating", 0.0, 3.0, "ModelError"))
    refused = ended(story(), "succeeded")
    refused.outcome = "refused"
    for told in (failed, refused):
        meter.observe(told)
    numbers = shown(meter.families())
    assert numbers[f"{SECONDS}_count{{stage=generate}}"] == 0
    assert numbers[f"{SECONDS}_count{{stage=total}}"] == 1
    assert numbers["gym_queue_worker_attempts_total{outcome=refused,stage=generate}"] == 1


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("waited", [0.0, BOUNDS[0], BOUNDS[-1], 1e9])
def test_every_outcome_and_every_length_has_a_place(outcome: str, waited: float) -> None:
    meter = Meter()
    meter.observe(story(outcome=outcome, waited=waited))
    numbers = shown(meter.families())
    assert numbers[f"{SECONDS}_bucket{{le=+Inf,stage=queued}}"] == 1
    assert numbers[f"{SECONDS}_bucket{{le=3600,stage=queued}}"] == (waited <= 3600)
    assert numbers[f"{SECONDS}_bucket{{le=0.005,stage=queued}}"] == (waited <= 0.005)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns of threads
def test_children_count_into_their_parents_meter() -> None:
    """Each in its own row; one that takes another's place goes on from its counts."""
    row = 0
    meter = Meter(3, lambda: row)
    for row in (0, 2, 2):  # noqa: B007 - the lambda reads it, in the child
        child = os.fork()
        if not child:
            meter.observe(story())
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    numbers = shown(meter.families())
    assert numbers["gym_queue_worker_attempts_total{outcome=generated,stage=generate}"] == 3
    assert numbers[f"{SECONDS}_sum{{stage=queued}}"] == 6.0


def test_steps_and_usage_belong_to_the_attempt_in_hand() -> None:
    told = story()
    with about(told):
        with step("reset"):
            pass
        with pytest.raises(ValueError), step("generating"):  # noqa: PT011 - any
            raise ValueError
        spent(Usage(prompt_tokens=1))
    with about(told.fence), step("reset"):
        pass
    with step("nobody's"):
        spent(Usage(prompt_tokens=5))
    assert [(name, error) for name, _, _, error in told.steps] == [
        ("reset", ""),
        ("generating", "ValueError"),
    ]
    assert all(begin <= end for _, begin, end, _ in told.steps)
    assert told.usage == Usage(prompt_tokens=1)


def test_all_that_is_defined_for_a_meter_is_shown() -> None:
    assert {family.metric.name for family in Meter().families()} == {
        definition.name.removesuffix("_total")
        for definition in (catalogue.STAGE_SECONDS, catalogue.ATTEMPTS, catalogue.WORKER_TOKENS)
    }
