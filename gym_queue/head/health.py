"""Whether the head is there, whether it can work, and what it measures."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Response

from gym_queue.errors import LedgerError
from gym_queue.head.errors import answer, responses
from gym_queue.head.services import Services
from gym_queue.records import Record
from gym_queue.telemetry.exposition import CONTENT_TYPE

router = APIRouter(tags=["operation"])

_PATIENCE = 2.0
"""Seconds for Redis to answer a probe."""


class Health(Record):
    """That a part of the head is well."""

    status: str


@router.get("/health", summary="Is the head there?", responses=responses())
async def health() -> Health:
    """Answer as long as the process does. Needs no token."""
    return Health(status="ok")


@router.get("/ready", summary="Can the head work?", response_model=Health, responses=responses(503))
async def ready(services: Services) -> Health | Response:
    """Answer 200 if Redis answers the head and it is not about to stop. Needs no token."""
    if services.stopping.is_set():
        return answer(503, "the head is about to stop")
    try:
        async with asyncio.timeout(_PATIENCE):
            await services.ledger.run("")
    except (LedgerError, TimeoutError):
        return answer(503, "Redis does not answer")
    return Health(status="ready")


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,  # of no type of its own: that of errors is JSON
    responses=responses() | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(services: Services) -> Response:
    """Return what is known of the whole fleet, in the text format of Prometheus; every head says the same."""
    return Response(await services.metrics.render(), media_type=CONTENT_TYPE)
