"""The closing words of a run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gym_queue.coordinator.archive import OutputPaths
    from gym_queue.coordinator.metrics import RunMetrics
    from gym_queue.records import FailureClass

_LONGEST_ERROR = 200


def summary(metrics: RunMetrics, paths: OutputPaths) -> Iterator[str]:
    """Yield the lines that say what came out and where it is."""
    counts, reward = metrics.rollouts, metrics.reward
    cancelled = f", {counts.cancelled} cancelled" if counts.cancelled else ""
    yield f"{counts.ended} rollouts: {counts.succeeded} succeeded, {counts.failed} failed{cancelled}"
    if reward.mean is not None:
        error = reward.standard_error_clustered or reward.standard_error
        spread = f" ± {error:.4f} (standard error)" if error is not None else ""
        yield f"mean reward {reward.mean:.4f}{spread}"
    known = [f"pass@{k} {value:.4f}" for k, value in metrics.pass_at_k.items() if value is not None]
    if known:
        yield ", ".join(known)
    if metrics.failures_by_class:
        errors = first_errors(paths.failures, set(metrics.failures_by_class))
        for name, count in metrics.failures_by_class.items():
            yield f"{count} failed by {name}, such as: {errors.get(name, 'not in the file')}"
    yield f"rollouts: {paths.rows}"
    if counts.failed or counts.cancelled:
        yield f"failures: {paths.failures}"
    yield f"metrics:  {paths.metrics}"


def first_errors(failures: Path, wanted: set[FailureClass]) -> dict[str, str]:
    """Return the error of the first row of each wanted class, reading no further than needed."""
    errors: dict[str, str] = {}
    with failures.open("rb") as lines:
        for line in lines:
            if len(errors) == len(wanted):
                break
            row: dict[str, Any] = json.loads(line)
            if row["class"] is not None and row["class"] not in errors:
                sentence = " ".join(str(row["error"]).split())
                cut = len(sentence) > _LONGEST_ERROR
                errors[row["class"]] = sentence[:_LONGEST_ERROR] + "…" * cut
    return errors
