"""Rows of ended rollouts, where they are: in a run's files, or still in the results stream."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gym_queue.cli.wording import cut
from gym_queue.errors import UsageError
from gym_queue.output import FailedRow, SucceededRow
from gym_queue.records import FailureClass, rollout_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from gym_queue.cli.lookup import Place
    from gym_queue.coordinator.archive import OutputPaths
    from gym_queue.ledger.base import Event, Ledger
    from gym_queue.output import RolloutRow

_BATCH = 1000
_Row = TypeVar("_Row", bound=BaseModel)


class DeadLetter(BaseModel):
    """The part of a failed row that says what happened; the rest never becomes Python objects."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    rollout_id: str
    attempt: int
    state: str
    failure_class: FailureClass | None = Field(alias="class")
    stage: str | None
    error: str | None


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield the whole lines of a file that may be missing and may be written meanwhile."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line[:-1]


def read(kind: type[_Row], line: bytes, path: Path) -> _Row:
    """Parse one line of a file.

    Raises:
        UsageError: it is no row.
    """
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        msg = f"{path} holds a line that is no rollout's row: {cut(line.decode(errors='replace'), 60)}"
        raise UsageError(msg) from error


def find(where: OutputPaths, place: Place) -> tuple[RolloutRow, Path] | None:
    """Return the row of a rollout and the file that holds it."""
    wanted = rollout_id(*place)
    needle = b'"rollout_id":"%s"' % wanted.encode()  # as we write it; what a conversation quotes is escaped
    kinds: tuple[tuple[Path, type[RolloutRow]], ...] = (
        (where.rows, SucceededRow),
        (where.failures, FailedRow),
    )
    for path, kind in kinds:
        for line in lines_of(path):
            if needle in line:
                row = read(kind, line, path)
                if row.rollout_id == wanted:  # not the one of a field that we pass on
                    return row, path
    return None


async def stream(ledger: Ledger, run_id: str) -> AsyncIterator[Event]:
    """Yield the events that the archive has not acknowledged."""
    after = ""
    while events := await ledger.events(run_id, after, _BATCH, 0.0):
        for event in events:
            yield event
        after = events[-1].position


async def in_stream(ledger: Ledger, place: Place) -> RolloutRow | None:
    """Return the row of a rollout that is not archived yet."""
    async for event in stream(ledger, place.run_id):
        summary = event.summary
        if (summary.example_index, summary.sample_index) == place[1:]:
            kind = SucceededRow if summary.state == "succeeded" else FailedRow
            return kind.model_validate_json(event.row)
    return None
