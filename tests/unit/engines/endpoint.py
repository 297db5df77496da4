"""A scripted endpoint in this process, for the tests of the HTTP engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiohttp import web

from gym_queue.records import Sampling
from gym_queue.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gym_queue.engines.openai import OpenAIEngine


SETTINGS = Settings(api_key="sk-secret", http_client_timeout=20.0)
ASK = ({"role": "user", "content": "2+2"},)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def answer(**changes: Any) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "4", "tool_calls": [], "refusal": None},
        "finish_reason": "stop",
        **changes.pop("choice", {}),
    }
    return {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}, **changes}


def ok(**changes: Any) -> web.Response:
    return web.json_response(answer(**changes))


class Endpoint:
    """A scripted endpoint: answers chat completions with ``script`` in turn, the last one for ever."""

    def __init__(self) -> None:
        self.script: list[Callable[[web.Request], Awaitable[web.StreamResponse]] | web.Response] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        self.models = 0
        self.base = ""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(await request.json())
        self.headers.append(request.headers.get("Authorization"))
        step = self.script[min(len(self.requests), len(self.script)) - 1]
        if isinstance(step, web.Response):
            return web.Response(body=step.body, status=step.status, headers=step.headers)
        return await step(request)

    async def list_models(self, request: web.Request) -> web.Response:
        del request
        self.models += 1
        return web.json_response({"data": [{"id": "served"}, {"id": "other"}]})


async def ask(engine: OpenAIEngine, **changes: Any) -> Any:
    return await engine.generate(ASK, **{"sampling": Sampling(), "seed": 5, **changes})
