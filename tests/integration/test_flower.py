"""Flower, the dashboard, beside real workers: it shows our tasks under their names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import aiohttp

from gym_queue import names
from gym_queue.testing import async_wait_until
from tests.integration.fleet import Fleet

if TYPE_CHECKING:
    from pathlib import Path


async def test_flower_shows_our_tasks(redis_url: str, tmp_path: Path, unused_tcp_port: int) -> None:
    page = f"http://127.0.0.1:{unused_tcp_port}/api"
    async with (
        Fleet(redis_url, tmp_path, FLOWER_UNAUTHENTICATED_API=1) as fleet,
        aiohttp.ClientSession() as browser,
    ):

        async def shown(what: str) -> dict[str, Any]:
            try:
                async with browser.get(f"{page}/{what}") as answer:
                    said: dict[str, Any] = await answer.json()
                    return said
            except aiohttp.ClientConnectionError:
                return {}

        fleet.launch("flower", "workers.cpu", "flower", f"--port={unused_tcp_port}", "--address=127.0.0.1")
        fleet.launch("gpu", "workers.gpu", "worker", "-E", "-n", "gpu@%h")
        fleet.launch("cpu", "workers.cpu", "worker", "-E", "-n", "cpu@%h")

        async def sees_both() -> bool:
            return len(await shown("workers?refresh=1")) == 2

        await async_wait_until(sees_both, 60, what="both workers in Flower")
        run = await fleet.submit([{"queued": True}] * 3)
        await fleet.collect(run)

        async def sees_tasks() -> bool:
            tasks = (await shown("tasks")).values()
            done = [task["name"] for task in tasks if task["state"] == "SUCCESS"]
            return sorted(done) == [names.GENERATE_TASK] * 3 + [names.VERIFY_TASK] * 3

        await async_wait_until(sees_tasks, 30, what="the tasks in Flower")
        run.assert_each_ended_once()
