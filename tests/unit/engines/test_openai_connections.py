"""The HTTP engine's connections: cancelled calls, thousands at once, and the look before a run."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gym_queue.engines import openai
from gym_queue.engines.openai import OpenAIEngine
from gym_queue.errors import EngineSetupError, EngineUnavailableError
from tests.unit.engines.endpoint import SETTINGS, Endpoint, ask, ok

if TYPE_CHECKING:
    from collections.abc import Iterator


async def test_cancelling_a_call_closes_its_request(engine: OpenAIEngine, endpoint: Endpoint) -> None:
    started, dropped = asyncio.Event(), asyncio.Event()

    async def hang(request: web.Request) -> web.StreamResponse:
        del request
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            dropped.set()
            raise
        return web.Response()

    endpoint.script = [hang]
    call = asyncio.create_task(ask(engine))
    await started.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(10):
        await dropped.wait()


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
async def test_thousands_of_waiting_requests_do_not_slow_each_other_down(endpoint: Endpoint) -> None:
    """CPU time per request, client and server, at 4,096 waiting at once against 256: not quadratic.

    The garbage collector is off, because its cost grows with everything that lives in this process.
    """

    async def cost(count: int) -> float:
        waiting, all_there, go = 0, asyncio.Event(), asyncio.Event()

        async def hold(request: web.Request) -> web.StreamResponse:
            nonlocal waiting
            del request
            waiting += 1
            if waiting == count:
                all_there.set()
            await go.wait()
            return ok()

        endpoint.script = [hold]
        engine = OpenAIEngine(f"{endpoint.base}?model=m", SETTINGS)
        begin = time.process_time()
        calls = [asyncio.create_task(ask(engine)) for _ in range(count)]
        await all_there.wait()
        go.set()
        await asyncio.gather(*calls)
        spent = time.process_time() - begin
        await engine.close()
        return spent / count

    await cost(64)  # the first request pays for imports and the session
    few = min([await cost(256) for _ in range(3)])
    many = await cost(4096)
    assert many < 2 * few


def test_check_names_what_is_wrong(unused_tcp_port: int) -> None:
    with pytest.raises(EngineUnavailableError, match="Connection refused"):
        openai.check(f"http://127.0.0.1:{unused_tcp_port}/v1", SETTINGS)
    with pytest.raises(EngineUnavailableError, match="cannot be reached"):
        openai.check("http://no-such-host.invalid/v1", SETTINGS)
    for model in ("http://", "http://h:99999/v1", "http://h/v1?name=x", "http://h/v1?x"):
        with pytest.raises(EngineSetupError, match="is not understood"):
            openai.check(model, SETTINGS)
    with pytest.raises(EngineSetupError, match="must not carry a password") as caught:
        openai.check("http://me:hunter2@h/v1", SETTINGS)
    assert "hunter2" not in str(caught.value)


async def test_check_accepts_a_live_endpoint_and_explains_refusals(endpoint: Endpoint) -> None:
    await asyncio.to_thread(openai.check, endpoint.base, SETTINGS)
    with pytest.raises(EngineSetupError, match="end in /v1"):
        await asyncio.to_thread(openai.check, endpoint.base.removesuffix("/v1"), SETTINGS)


async def test_an_endpoint_that_names_no_model_says_so() -> None:
    async def nothing(request: web.Request) -> web.Response:
        del request
        return web.Response(text=json.dumps({"data": []}))

    app = web.Application()
    app.router.add_get("/v1/models", nothing)
    async with TestServer(app) as server:
        model = f"http://127.0.0.1:{server.port}/v1"
        with pytest.raises(EngineSetupError, match="names no model"):
            await asyncio.to_thread(openai.check, model, SETTINGS)


def test_an_engine_may_be_made_where_no_loop_runs() -> None:
    """A Celery worker makes it at its start, and may throw it away unused."""
    engine = openai.create("http://h/v1", SETTINGS)
    assert engine._session is None
    asyncio.run(engine.close())
