"""What a run's rollouts say in numbers, and those that failed."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from gym_queue.cli.rows import DeadLetter, read
from gym_queue.coordinator.metrics import Metrics, RunMetrics
from gym_queue.coordinator.rows import CANCELLED
from gym_queue.durable import storage_errors
from gym_queue.head.errors import responses
from gym_queue.head.services import RunId, Services
from gym_queue.records import FailureClass, Record

if TYPE_CHECKING:
    from pathlib import Path

    from gym_queue.coordinator.progress import Written

router = APIRouter(tags=["runs"])

_LONGEST_ERROR = 2000


class FailedRollout(Record):
    """A rollout that failed: at which stage and attempt, and why. Of a cancelled one, ``class`` says that."""

    rollout_id: str
    failure_class: str = Field(serialization_alias="class")
    stage: str | None
    attempt: int
    error: str


class FailureList(Record):
    """Failed rollouts, in the order in which they ended."""

    failures: list[FailedRollout]


@router.get("/v1/runs/{run_id}/metrics", summary="Metrics so far", responses=responses(404, 422))
async def metrics(services: Services, run_id: RunId) -> RunMetrics:
    """Sum up what has ended: rewards, pass@k, tokens, latency by stage, failures by class. While the run goes
    on the numbers may be some seconds old; those of one that has ended are the last.
    """
    view = await services.runs.show(run_id)
    found = await services.read(_read_metrics, services.folder(run_id).paths.metrics)
    return found or Metrics(view.spec.samples).snapshot()


@router.get("/v1/runs/{run_id}/failures", summary="Failed rollouts", responses=responses(404, 422))
async def failures(
    services: Services,
    run_id: RunId,
    wanted: Annotated[
        FailureClass | Literal["cancelled"] | None,
        Query(alias="class", description="Only this class; `cancelled` for those that were."),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> FailureList:
    """List rollouts that failed, those that ended first in front; without `class`, all but cancelled ones."""
    await services.runs.show(run_id)
    folder = services.folder(run_id)
    written = await services.read(folder.written)
    found = await asyncio.to_thread(_failed, folder.paths.failures, written, wanted, limit)
    return FailureList(failures=found)


def _read_metrics(path: Path) -> RunMetrics | None:
    """Return what was written last, if anything was."""
    with storage_errors(f"{path} cannot be read"):
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
    return RunMetrics(**{name: content[name] for name in RunMetrics.model_fields})


def _failed(path: Path, written: Written, wanted: str | None, limit: int) -> list[FailedRollout]:
    found: list[FailedRollout] = []
    place = 0
    if not written.failures:
        return found
    with storage_errors(f"{path} cannot be read"), path.open("rb") as lines:
        while place < written.failures and len(found) < limit:
            line = lines.readline()
            place += len(line)
            letter = read(DeadLetter, line, path)
            name = str(letter.failure_class or CANCELLED)
            if name == wanted or (wanted is None and name != CANCELLED):
                found.append(_shown(letter, name))
    return found


def _shown(letter: DeadLetter, name: str) -> FailedRollout:
    return FailedRollout(
        rollout_id=letter.rollout_id,
        failure_class=name,
        stage=letter.stage,
        attempt=letter.attempt,
        error=(letter.error or "")[:_LONGEST_ERROR],
    )
