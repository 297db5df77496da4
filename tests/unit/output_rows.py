"""Ended rollouts for the tests of the output: rows as workers write them, with their summaries."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from gym_queue.ledger.base import Event
from gym_queue.output import FailedRow, RolloutRow, SucceededRow
from gym_queue.records import FailureClass, Stage, Summary, Timings, Tokens, Usage, rollout_id

if TYPE_CHECKING:
    from pathlib import Path

State = Literal["succeeded", "failed", "cancelled"]


def ended(
    example: int,
    sample: int,
    *,
    state: State = "succeeded",
    reward: float | None = 1.0,
    metrics: dict[str, float] | None = None,
    failure_class: FailureClass = FailureClass.TIMEOUT,
    seconds: float = 2.0,
    padding: str = "",
    version: int | None = None,
) -> Event:
    """Return the event of one ended rollout; ``padding`` makes its row longer. With ``version``, it has a
    token of those weights and one of the next.
    """
    failed = state == "failed"
    facts: dict[str, Any] = {
        "attempt": 1,
        "usage": Usage(prompt_tokens=10 + example, completion_tokens=5 + sample),
        "turns": 1 + sample,
        "timings": Timings(accepted_at=100.0, ended_at=100.0 + 2 * seconds, queued=0.5, generate=seconds),
    }
    place: dict[str, Any] = {"example_index": example, "sample_index": sample, "state": state}
    outcome: dict[str, Any] = {"reward": reward, "metrics": metrics or {}} if state == "succeeded" else {}
    summary = Summary(
        **place,
        **facts,
        **outcome,
        failure_class=failure_class if failed else None,
        weight_version=version,
    )
    common: dict[str, Any] = {
        **place,
        **facts,
        "run_id": "run",
        "rollout_id": rollout_id("run", example, sample),
        "example_id": f"example-{example}",
        "environment": "rows",
        "model": "stub:",
        "messages": ({"role": "user", "content": f"What is {example}? {padding}"},),
        "trajectory": None if version is None else sampled_by(version),
        "finish_reason": "stop",
    }
    row: RolloutRow
    if state == "succeeded":
        row = SucceededRow(**common, **outcome)
    else:
        known = {"class": failure_class, "stage": Stage.GENERATE, "error": "too slow"}
        row = FailedRow(**common, **(known if failed else dict.fromkeys(known)))
    return Event(position=f"{example}-{sample}", summary=summary, row=row.model_dump_json().encode())


def sampled_by(version: int) -> Tokens:
    """Return a prompt token, one sampled by the next version, and one by this."""
    return Tokens(
        token_ids=(1, 2, 3), logprobs=None, loss_mask=(0, 1, 1), weight_version=(-1, version + 1, version)
    )


def places(path: Path) -> list[tuple[int, int]]:
    """Return (example, sample) of each row, in file order; every line must be whole."""
    content = path.read_bytes()
    assert not content or content.endswith(b"\n")
    rows = [json.loads(line) for line in content.splitlines()]
    return [(row["example_index"], row["sample_index"]) for row in rows]
