"""What goes wrong, as clients see it: a status, and ``{"error": {"type", "message"}}`` with one sentence.

What a caller did wrong is told in full. What broke here is told in general words and a reference; the log has
the details under that.
"""

from __future__ import annotations

import logging
import secrets
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.exceptions import HTTPException

from gym_queue import errors
from gym_queue.records import Record

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_log = logging.getLogger(__name__)

_LONGEST = 500
_RETRY_AFTER = 1

TYPES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    409: "conflict",
    413: "too_large",
    422: "invalid",
    429: "too_many_requests",
    500: "internal",
    503: "unavailable",
}
"""The ``type`` of an error by its status."""

_STATUSES: tuple[tuple[type[errors.GymQueueError], int], ...] = (
    (errors.UnknownRunError, 404),
    (errors.ConflictError, 409),
    (errors.UsageError, 422),
    (errors.InvalidExampleError, 422),
    (errors.EngineSetupError, 422),
    (errors.LedgerError, 503),
    (errors.RedisAwayError, 503),
    (errors.BrokerError, 503),
    (errors.DiskFullError, 503),
)
_AWAY = "the head cannot do this now, because {what}; try again in a moment"
_REASONS: tuple[tuple[type[errors.GymQueueError], str], ...] = (
    (errors.DiskFullError, "its disk has no room"),
    (errors.GymQueueError, "the Redis that it needs does not answer or takes no writes"),
)


class ErrorDetail(Record):
    """``type`` is for programs, ``message`` is one sentence for a person."""

    type: str = Field(examples=["not_found"])
    message: str = Field(examples=["there is no run 'math-1'"])


class ErrorBody(Record):
    """The body of every answer that is no success."""

    error: ErrorDetail


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what a route's OpenAPI says of these errors, and of those that any route may answer with."""
    said = {401: "The token is missing or wrong.", 429: "Too many requests.", 503: "Redis is away or full."}
    return {
        status: {"model": ErrorBody, "description": said.get(status, HTTPStatus(status).phrase)}
        for status in (*said, *statuses)
    }


def answer(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the answer for an error. ``message`` is put on one line, and cut where it is long."""
    line = " ".join(message.split()).encode(errors="replace").decode()
    line = line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"
    body = {"error": {"type": TYPES.get(status, "error"), "message": line}}
    return JSONResponse(body, status, headers)


def status_of(error: errors.GymQueueError) -> int:
    """Return the status for an error of ours: 500 where it is neither the caller's nor one that passes."""
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)


def sentence_of(problems: Sequence[Any]) -> str:
    """Condense what pydantic found into one sentence that names the field, and shows no value."""
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path", "header"))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{where or 'the body'}: {message}{more}"


def install(app: FastAPI) -> None:
    """Make an app answer errors in this way. What no handler takes is left to ``Guard``."""

    def handler(answer_to: Callable[[Any], JSONResponse]) -> Callable[[Request, Exception], Any]:
        async def handle(_request: Request, error: Exception) -> JSONResponse:
            return answer_to(error)

        return handle

    app.add_exception_handler(HTTPException, handler(_of_http))
    app.add_exception_handler(RequestValidationError, handler(lambda e: answer(422, sentence_of(e.errors()))))
    app.add_exception_handler(errors.GymQueueError, handler(_of_ours))


def _of_http(error: HTTPException) -> JSONResponse:
    words = {404: "there is no such route; see /openapi.json", 405: "this route does not know that method"}
    plain = error.detail in ("Not Found", "Method Not Allowed")
    return answer(error.status_code, words[error.status_code] if plain else error.detail, error.headers)


def _of_ours(error: errors.GymQueueError) -> JSONResponse:
    status = status_of(error)
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        raise error
    if status != HTTPStatus.SERVICE_UNAVAILABLE:
        return answer(status, str(error))
    _log.warning("a request could not be answered: %s", error)
    what = next(words for kind, words in _REASONS if isinstance(error, kind))
    return answer(status, _AWAY.format(what=what), {"Retry-After": str(_RETRY_AFTER)})


class Guard:
    """The outermost middleware: whatever an app lets escape becomes a 500 that says nothing of its inside."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            reference = secrets.token_hex(4)
            _log.exception("%s: %s %s failed", reference, scope["method"], scope["path"][:_LONGEST])
            if started:  # all that is left is to break the connection, so that nobody takes it for the end
                raise
            message = f"something went wrong in the head; its log says what under {reference}"
            await answer(500, message)(scope, receive, send)
