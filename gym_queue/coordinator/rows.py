"""Output rows as they are read back: what they say in short, and how some of them are taken out again."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from gym_queue.durable import replacement, storage_errors
from gym_queue.records import FailureClass, Summary, Timings, Tokens, Usage

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

CANCELLED = "cancelled"
"""What rows without a failure class are called where classes are named."""

RETRYABLE_ROWS = (*FailureClass, CANCELLED)
"""Every name that ``withdraw`` knows: all rows of a failures file have one of them."""


class _ArchivedRow(BaseModel):
    """The part of an output row that a ``Summary`` is made of; the rest never becomes Python objects."""

    model_config = ConfigDict(extra="ignore")

    example_index: NonNegativeInt
    sample_index: NonNegativeInt
    attempt: int
    state: Literal["succeeded", "failed", "cancelled"]
    reward: float | None = None
    metrics: dict[str, float | None] = Field(default_factory=dict)
    failure_class: FailureClass | None = Field(default=None, alias="class")
    usage: Usage
    turns: int = 0
    timings: Timings


def read_summary(line: bytes) -> Summary:
    """Rebuild from an output row the summary that came with it, but for the version of its weights.

    Raises:
        pydantic.ValidationError: the line is not an output row.
    """
    row = _ArchivedRow.model_validate_json(line)
    known = {name: value for name, value in row.metrics.items() if value is not None}
    return Summary(**{**dict(row), "metrics": known})


class _SampledRow(BaseModel):
    """The part of an output row that says which weights sampled it."""

    model_config = ConfigDict(extra="ignore")

    trajectory: Tokens | None = None


def read_weight_version(line: bytes) -> int | None:
    """Return what ``Summary.weight_version`` says, which ``read_summary`` leaves out: it costs a look at
    every token.

    Raises:
        pydantic.ValidationError: the line is not an output row.
    """
    tokens = _SampledRow.model_validate_json(line).trajectory
    return tokens.oldest_version if tokens else None


def withdraw(failures: Path, classes: Collection[str]) -> Counter[str]:
    """Take the rows of these classes (of ``RETRYABLE_ROWS``) out of a failures file, all at once and durably.

    Whoever resumes the run then finds these rollouts not done. A line that is no row stays, for whoever reads
    the file next to judge. Returns how many rows went, by class.

    Raises:
        StorageError: the file cannot be read or replaced; it is as it was.
    """
    withdrawn: Counter[str] = Counter()
    with (
        storage_errors(f"{failures} cannot be rewritten"),
        failures.open("rb") as lines,
        replacement(failures) as kept,
    ):
        for line in lines:
            name = _class_of(line)
            if name in classes:
                withdrawn[name] += 1
            else:
                kept.write(line)
    return withdrawn


def _class_of(line: bytes) -> str:
    """Return the name under which a row's rollout can be asked for again; empty if this is no whole row."""
    try:
        summary = read_summary(line)
    except ValidationError:
        return ""
    return (summary.failure_class or CANCELLED) if line.endswith(b"\n") else ""


def reason(error: ValueError) -> str:
    """Say what is wrong with a row, in a few words."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join([*map(str, first["loc"]), first["msg"]])
    return str(error)


def is_broken_json(error: ValueError) -> bool:
    """Tell a torn line from one that somebody else wrote."""
    return isinstance(error, ValidationError) and error.errors()[0]["type"] == "json_invalid"
