"""The head's app: routes, who may use them and how much, and what they work with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from gym_queue.head import errors, feeds, fleet, health, models, nemo, results, rollouts, runs
from gym_queue.head.auth import Auth
from gym_queue.head.errors import Guard
from gym_queue.head.limits import BodyLimit, RateLimit
from gym_queue.head.services import opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gym_queue.head.services import HeadServices
    from gym_queue.settings import Settings

_ABOUT = """\
Runs of rollouts: give examples, and follow the rollouts and groups as they end. Every error is
`{"error": {"type", "message"}}` with one sentence. Where the head was started with a token, all but `/health`
and `/ready` ask for `Authorization: Bearer TOKEN`.
"""
_TAGS = (
    ("runs", "Create runs, give them examples, steer them."),
    ("feeds", "What has ended, line by line; a cursor says how far a reader is."),
    ("rollouts", "One rollout."),
    ("fleet", "Workers and servers."),
    ("models", "Versions of weights."),
    ("NeMo Gym", "What NeMo Gym's clients ask its head server."),
    ("operation", "Probes and metrics."),
)

Opener = Callable[["Settings"], AbstractAsyncContextManager["HeadServices"]]


def create_app(settings: Settings, open_services: Opener = opened) -> FastAPI:
    """Make the app. ``open_services`` makes what the routes work with, from start to stop."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services(settings) as services:
            app.state.services = services
            yield

    app = FastAPI(
        title="gym_queue head",
        summary="Collects rollouts for RL post-training, each ending exactly once.",
        description=_ABOUT,
        version=_version(),
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_tags=[{"name": name, "description": text} for name, text in _TAGS],
        swagger_ui_oauth2_redirect_url=None,
    )
    for part in (runs, results, feeds, rollouts, fleet, models, nemo, health):
        app.include_router(part.router)
    errors.install(app)
    # The last one added is the first to see a request.
    app.add_middleware(BodyLimit, largest=settings.max_request_bytes)
    app.add_middleware(Auth, token=settings.auth_token)
    app.add_middleware(RateLimit, rate=settings.rate_limit)
    app.add_middleware(Guard)
    if settings.auth_token:
        _describe_token(app)
    return app


def _describe_token(app: FastAPI) -> None:
    """Say in the OpenAPI document that a token is asked for, where it is."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        document = describe()
        document.setdefault("components", {})["securitySchemes"] = {
            "token": {"type": "http", "scheme": "bearer", "description": "GYM_QUEUE_AUTH_TOKEN of the head"}
        }
        document["security"] = [{"token": []}]
        for path in ("/health", "/ready"):
            document["paths"][path]["get"]["security"] = []
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _version() -> str:
    try:
        return version("gym-queue")
    except PackageNotFoundError:  # run from a source tree
        return "0"
