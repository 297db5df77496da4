"""Runs: create them, give them examples, look at them, steer them."""

from __future__ import annotations

import asyncio
import uuid
from typing import Annotated

from fastapi import APIRouter, Header, HTTPException, Query, Request, Response

from gym_queue.api import RunRequest, RunView
from gym_queue.head.bodies import StrictRoute, check_values
from gym_queue.head.errors import responses
from gym_queue.head.services import RunId, Services
from gym_queue.maintenance.publication import offer_waiting
from gym_queue.records import Record, RunState

router = APIRouter(route_class=StrictRoute, tags=["runs"])

MOST_LINES = 200_000
"""Lines of one request with examples."""

_SHORT = 65_536
"""Bytes of examples that are looked at where they arrive; more are for a thread."""

_LARGEST_OFFSET = 2**53

_NDJSON = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-ndjson": {
                "schema": {"type": "string", "description": "One example a line, each a JSON object."},
                "example": '{"id": "sum-1", "prompt": "What is 2 + 3?", "answer": "5"}\n',
            }
        },
    }
}


class RunList(Record):
    """Runs, the newest first."""

    runs: list[RunView]


class Appended(Record):
    """How many examples a run has now."""

    examples: int


@router.post(
    "/v1/runs",
    status_code=201,
    summary="Create a run",
    responses=responses(409, 413, 422) | {200: {"model": RunView, "description": "It was there already."}},
)
async def create(
    services: Services,
    request: RunRequest,
    response: Response,
    idempotency_key: Annotated[
        str | None,
        Header(
            description="The same key and body again return the run that is there; with another body: 409.",
            pattern=r"^[!-~]{1,200}$",
        ),
    ] = None,
) -> RunView:
    """Create a run that takes examples until it is closed; with `environments` it brings its own."""
    view, created = await services.runs.create(request, idempotency_key or uuid.uuid4().hex)
    response.status_code = 201 if created else 200
    return view


@router.get("/v1/runs", summary="List runs", responses=responses(422))
async def list_runs(
    services: Services,
    state: Annotated[RunState | None, Query(description="Only runs in this state.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> RunList:
    """List runs, the newest first, those that have ended too."""
    return RunList(runs=await services.runs.list(state, limit))


@router.get("/v1/runs/{run_id}", summary="Show a run", responses=responses(404, 422))
async def show(services: Services, run_id: RunId) -> RunView:
    """Show where a run stands."""
    return await services.runs.show(run_id)


@router.post(
    "/v1/runs/{run_id}/examples",
    summary="Append examples",
    responses=responses(404, 408, 409, 413, 422),
    openapi_extra=_NDJSON,
)
async def append(
    services: Services,
    run_id: RunId,
    request: Request,
    offset: Annotated[
        int | None,
        Query(
            ge=0,
            le=_LARGEST_OFFSET,
            description="Index of the first of these examples in the run: then a repeated request appends "
            "once. 409 if that would leave a gap, or other examples are there.",
        ),
    ] = None,
) -> Appended:
    """Append examples, one JSON object a line: all of them, or none where one cannot be used."""
    body = await request.body()
    if len(body) > _SHORT:
        await asyncio.to_thread(_check, body)
    else:
        _check(body)
    return Appended(examples=await services.runs.append(run_id, body, offset))


@router.post("/v1/runs/{run_id}/close", summary="Take no more examples", responses=responses(404, 422))
async def close(services: Services, run_id: RunId) -> RunView:
    """Take no more examples: the run ends when those it has are done. Safe to repeat."""
    return await services.runs.close(run_id)


@router.post("/v1/runs/{run_id}/cancel", summary="Cancel a run", responses=responses(404, 409, 422))
async def cancel(services: Services, run_id: RunId) -> RunView:
    """End a run for good: nothing new starts, and every open rollout ends as cancelled."""
    return await services.runs.cancel(run_id)


@router.post("/v1/runs/{run_id}/pause", summary="Pause a run", responses=responses(404, 409, 422))
async def pause(services: Services, run_id: RunId) -> RunView:
    """Start nothing new of a run. What is in flight goes on, and what was generated is verified."""
    return await services.runs.pause(run_id)


@router.post("/v1/runs/{run_id}/resume", summary="Resume a run", responses=responses(404, 409, 422))
async def resume(services: Services, run_id: RunId) -> RunView:
    """Go on with a run where it was paused."""
    view = await services.runs.resume(run_id)
    await offer_waiting(services.ledger, services.publisher, run_id)
    return view


def _check(body: bytes) -> None:
    """Refuse what would take long to read. Raises a 413."""
    if body.count(b"\n") > MOST_LINES:
        raise HTTPException(413, f"more than {MOST_LINES:,} lines: send them in several requests")
    for number, line in enumerate(body.split(b"\n"), 1):
        try:
            check_values(line)
        except ValueError as error:
            raise HTTPException(413, f"line {number}: {error}") from error
