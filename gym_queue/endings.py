"""How the end of a rollout is written down: the row for the archive and its summary. Pure functions.

Whoever ends a rollout (the pipeline, the sweep for a worker that died, a cancel) writes it through here, so
that rows look the same whatever ended them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from gym_queue.ledger.base import Ended
from gym_queue.output import ROW_FIELDS, FailedRow, RolloutRow, SucceededRow
from gym_queue.records import Example, Record, RunSpec, Summary, Timings, Trajectory, Usage, rollout_id

if TYPE_CHECKING:
    from gym_queue.records import Failure, Verdict


class Draft(Record):
    """A trajectory that waits for its verdict, with what its row will need: the payload between the two
    stages.

    ``queued`` and ``generate`` are seconds, ``attempt`` is the generate attempt that made it.
    """

    attempt: int
    trajectory: Trajectory
    queued: float
    generate: float


class Place(NamedTuple):
    """Which rollout is meant: its run, example and sample."""

    spec: RunSpec
    example: Example
    example_index: int
    sample_index: int


def succeeded(place: Place, draft: Draft, verdict: Verdict, timings: Timings) -> Ended:
    """End a rollout that was generated and verified."""
    row = SucceededRow(
        **_common(place, draft.attempt, timings, draft.trajectory),
        state="succeeded",
        reward=verdict.reward,
        metrics=verdict.metrics,
    )
    return _ended(row, reward=verdict.reward, metrics=verdict.metrics)


def failed(
    place: Place, failure: Failure, attempt: int, timings: Timings, draft: Draft | None = None
) -> Ended:
    """End a rollout as failed, with the class of the failure and, where there is one, its trajectory."""
    fields = _common(place, draft.attempt if draft else attempt, timings, draft.trajectory if draft else None)
    fields |= {"class": failure.failure_class, "stage": failure.stage, "error": failure.error}
    return _ended(FailedRow(**fields, state="failed"), failure_class=failure.failure_class)


def cancelled(place: Place, timings: Timings, reason: str) -> Ended:
    """End a rollout as cancelled. It is in the failures file, without a class: nothing failed."""
    fields = _common(place, 0, timings, None) | {"class": None, "stage": None, "error": reason}
    return _ended(FailedRow(**fields, state="cancelled"))


def _common(place: Place, attempt: int, timings: Timings, trajectory: Trajectory | None) -> dict[str, Any]:
    """Return the fields that all rows share, beside the fields of the input that we do not know."""
    spec, example = place.spec, place.example
    extra = {f"input_{name}" if name in ROW_FIELDS else name: value for name, value in example.extra.items()}
    return extra | {
        "run_id": spec.run_id,
        "rollout_id": rollout_id(spec.run_id, place.example_index, place.sample_index),
        "example_id": example.id,
        "example_index": place.example_index,
        "sample_index": place.sample_index,
        "attempt": attempt,
        "environment": example.environment,
        "model": spec.model,
        "messages": trajectory.messages if trajectory else (),
        "trajectory": trajectory.tokens if trajectory else None,
        "finish_reason": trajectory.finish_reason if trajectory else None,
        "usage": trajectory.usage if trajectory else Usage(),
        "turns": trajectory.turns if trajectory else 0,
        "timings": timings,
    }


def _ended(row: RolloutRow, **summary: Any) -> Ended:
    tokens = row.trajectory
    return Ended(
        summary=Summary(
            example_index=row.example_index,
            sample_index=row.sample_index,
            attempt=row.attempt,
            state=row.state,
            weight_version=tokens.oldest_version if tokens else None,
            usage=row.usage,
            turns=row.turns,
            timings=row.timings,
            **summary,
        ),
        row=row.model_dump_json(by_alias=True).encode(),
    )
