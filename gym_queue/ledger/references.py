"""What stands in the ledger for a payload that is kept elsewhere, and what is said if that payload is lost.

No user can forge one: what could be taken for a reference goes by reference itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field
from pydantic_core import from_json, to_json

from gym_queue.errors import GymQueueError
from gym_queue.ledger.base import Event
from gym_queue.records import Example, FailedRow, FailureClass, Record, rollout_id

if TYPE_CHECKING:
    from collections.abc import Mapping

MARK = b"\0payload:"
"""What references begin with, and no JSON does."""

KEY = "\0payload"
"""The key of the row that stands for an example."""

_CUT = "cut"

_LARGE = {"messages", "trajectory"}
_OF_A_FAILURE = {"failure_class", "stage", "error"}
_SMALL = frozenset(FailedRow.model_fields) - _LARGE - _OF_A_FAILURE

Found = GymQueueError | bytes
"""A payload, or why there is none."""


class Reference(Record):
    """Stands for a payload. That of a row also names the trajectory which the row was made of, and has the
    row's small fields.
    """

    name: str
    trajectory: str = ""
    row: dict[str, Any] = Field(default_factory=dict)

    def encode(self) -> bytes:
        """Return the bytes that the ledger keeps."""
        return MARK + self.model_dump_json(exclude_defaults=True).encode()


def decode(kept: bytes | None) -> Reference | None:
    """Return the reference that the ledger kept, or ``None`` where it kept the payload itself."""
    if kept is None or not kept.startswith(MARK):
        return None
    return Reference.model_validate_json(kept.removeprefix(MARK))


def small_fields(row: bytes) -> dict[str, Any]:
    """Return the fields of an output row that are small."""
    try:
        fields = from_json(row)
    except ValueError:
        return {}
    return {name: fields[name] for name in _SMALL & fields.keys()} if isinstance(fields, dict) else {}


def stand_in(example: Example, name: str, room: int) -> Example:
    """Return what the ledger keeps of an example: all that its rollouts' rows show, if that fits into
    ``room`` bytes.
    """
    fits = len(to_json(example.extra)) <= room
    row = {KEY: name} if fits else {KEY: name, _CUT: True}
    extra = example.extra if fits else {}
    return Example(id=example.id, environment=example.environment, row=row, extra=extra)


def name_in(example: Example) -> str:
    """Return the name of the payload that an example stands for, or nothing."""
    return str(example.row.get(KEY, ""))


def name_if_cut(example: Example) -> str:
    """Return the name of the payload without which an example's rows cannot be written, or nothing."""
    return name_in(example) if _CUT in example.row else ""


def outline(example: Example, found: Mapping[str, Found]) -> tuple[Example, str]:
    """Return all of an example that its rows show, and nothing; or what is left of it, and why."""
    if name_if_cut(example):
        return whole_example(example, found)
    return (example.model_copy(update={"row": {}}) if name_in(example) else example), ""


def whole_example(example: Example, found: Mapping[str, Found]) -> tuple[Example, str]:
    """Return the example that another stands for, and nothing; or what is left of it, and why."""
    name = name_in(example)
    payload = found.get(name, b"")
    if isinstance(payload, GymQueueError):
        return example.model_copy(update={"row": {}}), f"its example cannot be read: {payload}"
    return (Example.model_validate_json(payload) if name else example), ""


def lost(event: Event, reference: Reference, run_id: str, error: GymQueueError) -> Event:
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
