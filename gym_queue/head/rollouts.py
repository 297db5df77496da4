"""One rollout: what it waits for, and its end."""

from __future__ import annotations

from pathlib import Path as File
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, HTTPException, Path

from gym_queue.cli.answer import answer
from gym_queue.cli.lookup import Files, Subject, files_of, place_of
from gym_queue.errors import ConflictError, StorageError, UsageError
from gym_queue.head.errors import responses
from gym_queue.head.services import HeadServices, Services
from gym_queue.maintenance.cancel import cancel_rollout
from gym_queue.records import Record

if TYPE_CHECKING:
    from gym_queue.api import RunView
    from gym_queue.cli.lookup import Place

router = APIRouter(tags=["rollouts"])

_RolloutId = Annotated[
    str,
    Path(
        description="RUN.EXAMPLE.SAMPLE, the `rollout_id` in the rows.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.[0-9]{1,12}\.[0-9]{1,9}$",
        examples=["20261120-223109-4eeff0ca.12.0"],
    ),
]


class Why(Record):
    """What a rollout waits for, since when and what will happen next; or how it ended. One sentence."""

    why: str


class RolloutCancelled(Record):
    """That a rollout has ended as cancelled."""

    rollout_id: str
    cancelled: bool


@router.get("/v1/rollouts/{rollout_id}/why", summary="What does it wait for?", responses=responses(404, 422))
async def why(services: Services, rollout_id: _RolloutId) -> Why:
    """Say what a rollout waits for, since when, and what will happen next; or how it ended."""
    place = place_of(rollout_id)
    view = await _view(services, place)
    return Why(why=await answer(place, await _subject(services, view)))


@router.post(
    "/v1/rollouts/{rollout_id}/cancel", summary="Cancel one rollout", responses=responses(404, 409, 422)
)
async def cancel(services: Services, rollout_id: _RolloutId) -> RolloutCancelled:
    """End one rollout as cancelled, for good, whatever it is doing. 409: it is not open (any more or yet)."""
    place = place_of(rollout_id)
    view = await _view(services, place)
    if not await cancel_rollout(services.ledger, *place, reason="cancelled through the head"):
        msg = f"{rollout_id} is not open: {await answer(place, await _subject(services, view))}"
        raise ConflictError(msg)
    return RolloutCancelled(rollout_id=rollout_id, cancelled=True)


async def _view(services: HeadServices, place: Place) -> RunView:
    """Return the rollout's run. Raises a 404 where there is no such rollout."""
    view = await services.runs.show(place.run_id)
    if place.example_index >= view.examples:
        raise HTTPException(404, f"run {view.run_id} has {view.examples} examples: their indices begin at 0")
    if place.sample_index >= view.spec.samples:
        raise HTTPException(404, f"run {view.run_id} has {view.spec.samples} samples of each example")
    return view


async def _subject(services: HeadServices, view: RunView) -> Subject:
    return Subject(
        run_id=view.run_id,
        settings=services.settings,
        ledger=services.ledger,
        status=await services.ledger.run(view.run_id),
        files=await services.read(_files, services.folder(view.run_id).paths.rows, view.examples),
        headed=True,
        waiting_for=view.waiting_for,
    )


def _files(out: File, examples: int) -> Files | None:
    """Return the run's files; its manifest does not know how many examples came later."""
    try:
        found = files_of(out)
    except (UsageError, StorageError):
        return None
    return found._replace(manifest=found.manifest.model_copy(update={"examples": examples}))
