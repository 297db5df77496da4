"""What is handed on for what stands in the ledger: the payload, or what is said where there is none."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gym_queue.errors import GymQueueError, PayloadLostError
from gym_queue.ledger.base import Event
from gym_queue.ledger.references import decode, name_if_cut, name_in
from gym_queue.output import FailedRow
from gym_queue.records import Example, FailureClass, rollout_id

if TYPE_CHECKING:
    from gym_queue.ledger.base import Claim, ClaimedSample, OpenRollout, OwnedAttempt
    from gym_queue.ledger.references import Reference

_log = logging.getLogger(__name__)

Found = Mapping[str, bytes | GymQueueError]
"""By name, a payload or why there is none."""


def whole_claim(claim: Claim, found: Found) -> Claim:
    """Return a claim with its payloads; samples that lack one say why."""
    example, trouble = _whole_example(claim.example, found)
    samples = tuple(_whole_sample(sample, found, trouble) for sample in claim.samples)
    return claim.model_copy(update={"example": example, "samples": samples})


def whole_attempt(attempt: OwnedAttempt, found: Found) -> OwnedAttempt:
    """Return an attempt with its payload, or without if there is none."""
    reference = decode(attempt.payload)
    payload = found[reference.name] if reference else attempt.payload
    if isinstance(payload, GymQueueError):
        _log.warning("a trajectory cannot be read: %s", payload)
        payload = None
    return attempt.model_copy(update={"example": _outline(attempt.example, found), "payload": payload})


def whole_rollout(rollout: OpenRollout, found: Found) -> OpenRollout:
    """Return a rollout with all of its example that rows show."""
    return rollout.model_copy(update={"example": _outline(rollout.example, found)})


def whole_event(run_id: str, event: Event, reference: Reference | None, found: Found) -> Event:
    """Return an event with its row, or with that of a failure if its own is lost.

    Raises:
        GymQueueError: the row is not lost; this process cannot read it, or not now.
    """
    if reference is None:
        return event
    row = found[reference.name]
    if isinstance(row, PayloadLostError):
        place = event.summary.example_index, event.summary.sample_index
        _log.warning("rollout %s.%s: its row cannot be read: %s", *place, row)
        return _lost(event, reference, run_id, row)
    if isinstance(row, GymQueueError):
        raise row
    return event.model_copy(update={"row": row})


def _whole_example(example: Example, found: Found) -> tuple[Example, str]:
    """Return the example that another stands for, and nothing; or what is left of it, and why."""
    name = name_in(example)
    payload = found.get(name, b"")
    if isinstance(payload, GymQueueError):
        return example.model_copy(update={"row": {}}), f"its example cannot be read: {payload}"
    return (Example.model_validate_json(payload) if name else example), ""


def _outline(example: Example, found: Found) -> Example:
    """Return all of an example that its rows show, as far as it can be had."""
    if not name_if_cut(example):
        return example.model_copy(update={"row": {}}) if name_in(example) else example
    shown, trouble = _whole_example(example, found)
    if trouble:
        _log.warning("example %s: %s", example.id, trouble)
    return shown


def _whole_sample(sample: ClaimedSample, found: Found, trouble: str) -> ClaimedSample:
    reference = decode(sample.payload)
    payload = found[reference.name] if reference else sample.payload
    if isinstance(payload, GymQueueError):
        trouble = trouble or f"its trajectory cannot be read: {payload}"
        payload = None
    return sample.model_copy(update={"payload": payload, "unreadable": trouble})


def _lost(event: Event, reference: Reference, run_id: str, error: GymQueueError) -> Event:
    """Return how a rollout ends whose row is lost: as failed, unless it was cancelled."""
    summary = event.summary
    state = "cancelled" if summary.state == "cancelled" else "failed"
    failure_class = FailureClass.INFRASTRUCTURE if state == "failed" else None
    of_summary = {"example_index", "sample_index", "attempt", "usage", "turns", "timings"}
    known = {
        "run_id": run_id,
        "rollout_id": rollout_id(run_id, summary.example_index, summary.sample_index),
        "example_id": "",
        "environment": "",
        "model": "",
        "finish_reason": None,
        **summary.model_dump(include=of_summary),
        **reference.row,
    }
    ending = {"class": failure_class, "stage": None, "error": f"its row was lost: {error}", "state": state}
    row = FailedRow.model_validate({**known, **ending, "messages": (), "trajectory": None})
    changes: dict[str, Any] = {"state": state, "failure_class": failure_class, "reward": None, "metrics": {}}
    return Event(
        position=event.position,
        summary=summary.model_copy(update=changes),
        row=row.model_dump_json(by_alias=True).encode(),
    )
