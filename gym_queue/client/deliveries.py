"""What a feed delivers, as typed records; each says with which cursor the feed goes on behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, PrivateAttr, TypeAdapter, ValidationError

from gym_queue.api import GroupRow
from gym_queue.errors import HeadFailedError
from gym_queue.output import FailedRow, SucceededRow

if TYPE_CHECKING:
    from gym_queue.client.feed import Line


class _Delivered(BaseModel):
    """Something of a feed. The cursor is no field: a row of yours may have one of that name."""

    _cursor: str = PrivateAttr(default="")

    @property
    def cursor(self) -> str:
        """Where a feed goes on that shall begin behind this one."""
        return self._cursor


class Group(GroupRow, _Delivered):
    """A decided group: ``rollouts`` are output rows as dictionaries (``docs/reference/output.md``)."""

    @property
    def rewards(self) -> list[float | None]:
        """The rewards of its rollouts, in their order."""
        return [row["reward"] for row in self.rollouts]


class Succeeded(SucceededRow, _Delivered):
    """A rollout that succeeded."""


class Failed(FailedRow, _Delivered):
    """A rollout that failed or was cancelled."""


Rollout = Succeeded | Failed

_ROLLOUTS: TypeAdapter[Rollout] = TypeAdapter(Rollout)


def group_of(line: Line) -> Group:
    """Read a group. Raises ``HeadFailedError`` if it is none that this version knows."""
    try:
        group = Group.model_validate_json(line.body)
    except ValidationError as error:
        raise _unreadable(line, error) from error
    group._cursor = line.cursor  # noqa: SLF001 - ours; frozen records take it nowhere else
    return group


def rollout_of(line: Line) -> Rollout:
    """Read a rollout. Raises ``HeadFailedError`` if it is none that this version knows."""
    try:
        rollout = _ROLLOUTS.validate_json(line.body)
    except ValidationError as error:
        raise _unreadable(line, error) from error
    rollout._cursor = line.cursor  # noqa: SLF001 - the same
    return rollout


def _unreadable(line: Line, error: ValidationError) -> HeadFailedError:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return HeadFailedError(f"the head sends a {line.kind} that cannot be read ({where}: {first['msg']})")
