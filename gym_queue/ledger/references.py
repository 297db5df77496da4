"""What stands in the ledger for a payload that is kept elsewhere.

No user can forge one: what could be taken for a reference goes by reference itself.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from pydantic_core import from_json, to_json

from gym_queue.output import FailedRow
from gym_queue.records import Example, Record

MARK = b"\0payload:"
"""What references begin with, and no JSON does."""

KEY = "\0payload"
"""The key of the row that stands for an example."""

_CUT = "cut"

_LARGE = {"messages", "trajectory"}
_OF_A_FAILURE = {"failure_class", "stage", "error"}
_SMALL = frozenset(FailedRow.model_fields) - _LARGE - _OF_A_FAILURE


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
