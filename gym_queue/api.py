"""What the head and its clients say to each other: the bodies of ``docs/reference/head.md``, as records."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from gym_queue.records import Freshness, GroupPolicy, Record, RunSpec, RunState, Sampling

GroupOutcome = Literal["complete", "short", "uniform", "stale"]
"""How a group was decided (``GroupPolicy``): only ``complete`` ones are for the trainer. ``short``: too few
samples succeeded; ``uniform``: all rewards are equal; ``stale``: the weights that sampled it are too old.
"""


class MixPart(Record):
    """One environment of a mix that brings its own examples: ``size`` of them, drawn by ``weight``."""

    name: str
    size: int = Field(ge=1)
    weight: float = Field(default=1.0, gt=0)
    seed: int = 0


class RunRequest(Record):
    """A run to be created.

    ``limits`` are those of ``Limits`` that differ from the head's settings. ``environment`` is for examples
    that name none. With ``environments`` the run brings its own examples, and takes no others.
    """

    model: str
    samples: int = Field(default=1, ge=1)
    sampling: Sampling = Sampling()
    limits: dict[str, Any] = Field(default_factory=dict)
    priority: int = 0
    weight: float = Field(default=1.0, gt=0)
    groups: GroupPolicy = GroupPolicy()
    freshness: Freshness | None = None
    environment: str = "rows"
    environments: tuple[MixPart, ...] = ()


class GroupCounts(Record):
    """Decided groups of a run by outcome."""

    complete: int = 0
    short: int = 0
    uniform: int = 0
    stale: int = 0


class RunView(Record):
    """A run as the head shows it. Counts are rollouts, but for ``examples`` and ``groups``.

    ``closed``: no more examples will come. ``waiting_for`` is a sentence while the run cannot begin.
    """

    run_id: str
    state: RunState
    closed: bool
    examples: int
    accepted: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    queued: int = 0
    in_flight: int = 0
    archived: int = 0
    groups: GroupCounts = GroupCounts()
    reward_mean: float | None = None
    waiting_for: str | None = None
    spec: RunSpec


class GroupRow(Record):
    """A decided group as the feed shows it; ``rollouts`` are output rows, none unless it is ``complete``.

    ``weight_version`` is the oldest that sampled a token of it, ``None`` where nobody knows.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    run_id: str
    example_id: str
    example_index: int
    outcome: GroupOutcome
    weight_version: int | None = None
    rollouts: tuple[dict[str, Any], ...] = ()
