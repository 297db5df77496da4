"""Slow samples of a real fleet: a head, a worker, and an endpoint that sees its requests dropped."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from gym_queue.testing import async_wait_until
from tests.integration.fleet import Fleet
from tests.integration.head_process import HeadProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(240)

GROUPS, SAMPLES, USABLE = 64, 8, 6
SECONDS, TIMES_AS_LONG, ONE_IN = 0.2, 30, 20


class Endpoint:
    """Answers after a moment; one request in twenty takes thirty times as long."""

    def __init__(self) -> None:
        self.url = ""
        self.begin()

    def begin(self) -> None:
        self.requests = self.open = self.dropped = 0

    async def complete(self, request: web.Request) -> web.Response:
        await request.read()
        self.requests += 1
        slow = self.requests % ONE_IN == 0
        self.open += 1
        try:
            await asyncio.sleep(SECONDS * (TIMES_AS_LONG if slow else 1))
        except asyncio.CancelledError:
            self.dropped += 1
            raise
        finally:
            self.open -= 1
        choice = {"index": 0, "message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return web.json_response({"choices": [choice], "usage": usage})

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "slow"}]})

    @asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        app = web.Application()
        app.add_routes([web.post("/v1/chat/completions", self.complete), web.get("/v1/models", self.models)])
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        try:
            yield
        finally:
            await runner.cleanup()


async def collect(head: HeadProcess, endpoint: Endpoint, **policy: Any) -> tuple[float, dict[str, Any]]:
    """Run to the end; return how many seconds that took, and how the run stands."""
    endpoint.begin()
    request = {"model": endpoint.url, "samples": SAMPLES, "groups": policy}
    row = b'{"prompt": "What is 2 + 2?", "answer": "4"}\n'

    def run() -> tuple[float, dict[str, Any]]:
        path = f"/v1/runs/{head.post('/v1/runs', request)['run_id']}"
        started = time.monotonic()
        head.post(f"{path}/examples", row * GROUPS)
        head.post(f"{path}/close")
        *groups, end = head.follow(f"{path}/groups")
        seconds = time.monotonic() - started
        assert end["end"] == {"state": "ended"}
        usable = policy.get("usable", SAMPLES)
        assert [len(line["group"]["rollouts"]) for line in groups] == [usable] * GROUPS
        return seconds, head.get(path)

    return await asyncio.to_thread(run)


async def test_a_group_that_has_enough_stops_the_requests_of_the_rest(redis_url: str, tmp_path: Path) -> None:
    endpoint = Endpoint()
    async with endpoint.up(), Fleet(redis_url, tmp_path, GYM_QUEUE_CONCURRENCY=SAMPLES * GROUPS) as fleet:
        await fleet.start("gpu")
        environment = fleet.variables | {"GYM_QUEUE_RUNS_DIR": str(tmp_path / "runs")}
        with await asyncio.to_thread(HeadProcess, tmp_path, environment) as head:
            all_of_them, whole = await collect(head, endpoint)
            assert (whole["succeeded"], endpoint.requests, endpoint.dropped) == (512, 512, 0)
            enough, early = await collect(head, endpoint, usable=USABLE)
            await async_wait_until(lambda: endpoint.open == 0, 5, what="no request to be left")
    assert early["succeeded"] + early["cancelled"] == GROUPS * SAMPLES
    assert early["failed"] == 0
    slow = endpoint.requests // ONE_IN
    assert endpoint.dropped >= slow - 1, "each straggler's request is dropped; one may not have been needed"
    assert 2 * enough < all_of_them, (enough, all_of_them)
