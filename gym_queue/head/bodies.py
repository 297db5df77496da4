"""JSON bodies as the head takes them: no deeper, no larger and no stranger than what can be written again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from starlette.responses import Response

MOST_VALUES = 250_000
"""Values in one JSON text. A parser holds Python's lock, and with it the event loop: this many are a tenth of
a second.
"""


def check_values(text: bytes) -> None:
    """Refuse a JSON text that would take long to parse, before it is parsed.

    Raises:
        ValueError: one sentence.
    """
    if text.count(b",") + text.count(b"[") + text.count(b"{") > MOST_VALUES:
        msg = f"more than {MOST_VALUES:,} values in one JSON text"
        raise ValueError(msg)


def read_json(text: bytes) -> Any:
    """Parse JSON that is UTF-8, at most 200 deep, and has neither halves of surrogates nor infinite numbers.

    Raises:
        ValueError: one sentence.
    """
    check_values(text)
    value = from_json(text, allow_inf_nan=False)
    json.dumps(value, allow_nan=False)  # 1e999 is read as infinite
    return value


class _StrictRequest(Request):
    async def json(self) -> Any:
        """Return the body, parsed. Raises a 422."""
        if not hasattr(self, "_json"):
            try:
                self._json = read_json(await self.body())
            except ValueError as error:
                raise HTTPException(422, f"the body is not JSON that can be used: {error}") from error
        return self._json


class StrictRoute(APIRoute):
    """A route whose JSON body is read by ``read_json``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what FastAPI calls with a request."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict
