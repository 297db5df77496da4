"""The lines of the output files, as every reader meets them (``docs/reference/output.md``)."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from gym_queue.records import SCHEMA_VERSION, FailureClass, Message, Stage, Timings, Tokens, Usage


class RolloutRow(BaseModel):
    """One line of ``OUT.jsonl`` (succeeded) or ``OUT.failures.jsonl`` (failed, cancelled: no ``reward``)."""

    model_config = ConfigDict(frozen=True, extra="allow", ser_json_inf_nan="null")

    version: int = SCHEMA_VERSION
    run_id: str
    rollout_id: str
    example_id: str
    example_index: int
    sample_index: int
    attempt: int
    environment: str
    model: str
    state: Literal["succeeded", "failed", "cancelled"]
    messages: tuple[Message, ...]
    trajectory: Tokens | None
    finish_reason: str | None
    usage: Usage
    turns: int = 0
    timings: Timings


class SucceededRow(RolloutRow):
    """One line of ``OUT.jsonl``. ``reward`` is ``None`` only where nothing was asked."""

    state: Literal["succeeded"] = "succeeded"
    reward: float | None
    metrics: dict[str, float] = Field(default_factory=dict)


class FailedRow(RolloutRow):
    """One line of ``OUT.failures.jsonl``; in JSON ``failure_class`` is called ``class``.

    Class, stage and error are ``None`` where the rollout was cancelled.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    state: Literal["failed", "cancelled"]
    failure_class: FailureClass | None = Field(alias="class")
    stage: Stage | None
    error: str | None


ROW_FIELDS = frozenset(
    name
    for row in (SucceededRow, FailedRow)
    for key, field in row.model_fields.items()
    for name in (key, field.alias or key)
)
"""Names that rows of both output files keep for themselves: an input field called so becomes
``input_<name>``.
"""
