"""Versions of models' weights: what the trainer announces, and what is the newest."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from gym_queue.errors import ConflictError
from gym_queue.head.bodies import StrictRoute
from gym_queue.head.errors import responses
from gym_queue.head.services import Services
from gym_queue.records import Record, Weights

router = APIRouter(route_class=StrictRoute)


class VersionList(Record):
    """The newest announced weights of a model; none where none ever were."""

    versions: list[Weights]


@router.post(
    "/v1/models/versions",
    status_code=201,
    tags=["models"],
    summary="Announce new weights",
    responses=responses(409, 413, 422),
)
async def announce(services: Services, weights: Weights) -> Weights:
    """Make a version of a model's weights the newest. Workers load it before the next rollout they begin.

    409: that or a newer version was announced before.
    """
    if not await services.ledger.announce(weights):
        newest = await services.ledger.weights(weights.model)
        known = f"version {newest.version}" if newest else "a newer version"
        msg = f"{known} of this model was announced already: {weights.version} is not newer"
        raise ConflictError(msg)
    return weights


@router.get(
    "/v1/models/versions", tags=["models"], summary="The newest weights of a model", responses=responses(422)
)
async def versions(
    services: Services, model: Annotated[str, Query(description="The model, as runs name it.", min_length=1)]
) -> VersionList:
    """Return the newest announced weights of a model."""
    newest = await services.ledger.weights(model)
    return VersionList(versions=[newest] if newest else [])
