"""A head as its users have it: a process, a real Redis, real workers, and HTTP."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from gym_queue import open_files
from gym_queue.records import Stage
from gym_queue.testing import async_wait_until, wait_until
from tests.integration.fleet import IMPATIENT, WORLD, Fleet
from tests.integration.head_process import COMMAND, TOKEN, HeadProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

_READERS = 1500  # more than a process may have open, by default
RUN = {"model": "stub:", "environment": WORLD}


def rows(*fields: dict[str, Any]) -> bytes:
    return b"".join(
        json.dumps({"id": str(number)} | row).encode() + b"\n" for number, row in enumerate(fields)
    )


@pytest.fixture
async def fleet(redis_url: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with Fleet(redis_url, tmp_path, **IMPATIENT, GYM_QUEUE_CONCURRENCY=8) as fleet:
        yield fleet


@pytest.fixture
def head(fleet: Fleet) -> Iterator[HeadProcess]:
    with HeadProcess(fleet.folder, fleet.variables) as process:
        yield process


async def test_a_run_from_its_first_example_to_its_last_row(fleet: Fleet, head: HeadProcess) -> None:
    view = head.post("/v1/runs", RUN | {"samples": 4}, headers={"Idempotency-Key": "k"})
    run_id, path = view["run_id"], f"/v1/runs/{view['run_id']}"
    assert (view["state"], view["closed"], view["examples"]) == ("open", False, 0)
    assert head.post("/v1/runs", RUN | {"samples": 4}, headers={"Idempotency-Key": "k"})["run_id"] == run_id
    wait_until(lambda: "0 of 1 expected workers" in (head.get(path)["waiting_for"] or ""), 30)
    body = rows(*[{} for _ in range(6)])
    assert head.post(f"{path}/examples?offset=0", body) == {"examples": 6}
    assert head.post(f"{path}/examples?offset=0", body) == {"examples": 6}
    assert "0 of 1 expected workers" in head.get(f"/v1/rollouts/{run_id}.0.0/why")["why"]

    await fleet.start("gpu")
    groups = await asyncio.to_thread(lambda: list(_first(head.follow(f"{path}/groups"), 6)))
    assert sorted(line["group"]["example_id"] for line in groups) == [str(number) for number in range(6)]
    assert all(len(line["group"]["rollouts"]) == 4 for line in groups)
    assert head.post(f"{path}/close")["closed"]
    lines = await asyncio.to_thread(lambda: list(head.follow(f"{path}/rollouts")))
    assert lines[-1]["end"] == {"state": "ended"}
    assert len({line["rollout"]["rollout_id"] for line in lines[:-1]}) == 24
    rest = await asyncio.to_thread(lambda: list(head.follow(f"{path}/rollouts", cursor=lines[9]["cursor"])))
    assert rest == lines[10:]

    view = head.get(path)
    assert (view["state"], view["succeeded"], view["archived"]) == ("ended", 24, 24)
    assert view["groups"]["complete"] == 6
    assert head.get(f"{path}/metrics")["rollouts"]["succeeded"] == 24
    assert head.get(f"{path}/failures") == {"failures": []}
    assert head.get(f"/v1/rollouts/{run_id}.5.3/why")["why"].startswith("ended: succeeded")
    assert [run["run_id"] for run in head.get("/v1/runs", state="ended")["runs"]] == [run_id]
    assert head.client.get(f"/v1/rollouts/{run_id}.6.0/why").status_code == 404


def _first(lines: Iterator[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    for _ in range(count):
        yield next(lines)


async def test_what_fails_is_shown_and_what_waits_is_steered(fleet: Fleet, head: HeadProcess) -> None:
    await fleet.start("gpu")
    assert [worker["kind"] for worker in head.get("/v1/workers")["workers"]] == ["gpu"]
    run_id = head.post("/v1/runs", RUN | {"limits": {"generate_timeout": 120}})["run_id"]
    path = f"/v1/runs/{run_id}"
    head.post(f"{path}/examples", rows({"verifier": "exits", "status": 3}, {"wait": True}, {"wait": True}))
    wait_until(lambda: head.get(path)["in_flight"] >= 2, 30, what="rollouts in flight")
    assert head.get(f"/v1/rollouts/{run_id}.1.0/why")["why"].startswith("generating")
    assert head.post(f"/v1/rollouts/{run_id}.1.0/cancel")["cancelled"]
    again = head.client.post(f"/v1/rollouts/{run_id}.1.0/cancel")
    assert again.status_code == 409
    assert "is not open: ended: cancelled" in again.json()["error"]["message"]
    assert head.post(f"{path}/pause")["state"] == "paused"
    assert head.post(f"{path}/resume")["state"] == "open"
    assert head.post(f"{path}/cancel")["state"] == "cancelled"
    lines = await asyncio.to_thread(lambda: list(head.follow(f"{path}/rollouts")))
    assert lines[-1]["end"] == {"state": "cancelled"}
    cancelled = head.get(f"{path}/failures", **{"class": "cancelled"})["failures"]
    assert {row["rollout_id"] for row in cancelled} >= {f"{run_id}.1.0", f"{run_id}.2.0"}
    refused = head.client.post(f"{path}/examples", content=rows({}))
    assert refused.status_code == 409


async def test_what_a_pause_made_workers_forget_is_sent_again(fleet: Fleet, head: HeadProcess) -> None:
    await fleet.start("gpu")
    path = f"/v1/runs/{head.post('/v1/runs', RUN)['run_id']}"
    head.post(f"{path}/examples", rows({}))
    wait_until(lambda: head.get(path)["succeeded"] == 1, 30)
    fleet.signal("gpu", signal.SIGTERM)
    assert await fleet.exit_status("gpu") == 0
    head.post(f"{path}/examples", b'{"id": "b"}\n{"id": "c"}\n')
    wait_until(lambda: head.get(path)["queued"] == 2, 30)
    head.post(f"{path}/pause")
    await fleet.start("gpu2")

    async def taken() -> bool:
        return await fleet.broker.depth(Stage.GENERATE) == 0

    await async_wait_until(taken, 30, what="tickets to be taken and forgotten")
    head.post(f"{path}/resume")
    head.post(f"{path}/close")
    lines = await asyncio.to_thread(lambda: list(head.follow(f"{path}/rollouts")))
    assert [line["rollout"]["state"] for line in lines[:-1]] == ["succeeded"] * 3


async def test_a_head_that_is_told_to_stop_ends_feeds_resigns_and_exits_with_0(
    fleet: Fleet, head: HeadProcess
) -> None:
    await fleet.start("gpu")
    run_id = head.post("/v1/runs", RUN)["run_id"]
    head.post(f"/v1/runs/{run_id}/examples", rows({}, {}, {}))
    seen: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: seen.extend(head.follow(f"/v1/runs/{run_id}/rollouts")))
    reader.start()
    wait_until(lambda: head.get(f"/v1/runs/{run_id}")["archived"] == 3, 30)
    with HeadProcess(fleet.folder, fleet.variables, "other") as other:
        assert head.stop() == 0
        reader.join(10)
        assert not reader.is_alive()
        assert len(seen) == 3
        assert "Traceback" not in head.log.read_text()
        other.post(f"/v1/runs/{run_id}/examples?offset=3", rows({"id": "last"}))
        other.post(f"/v1/runs/{run_id}/close")
        cursor = seen[-1]["cursor"]
        lines = await asyncio.to_thread(
            lambda: list(other.follow(f"/v1/runs/{run_id}/rollouts", cursor=cursor))
        )
        assert [line["rollout"]["example_id"] for line in lines[:-1]] == ["last"]
        assert other.stop() == 0


async def test_readers_of_a_quiet_run_all_hear_its_end(head: HeadProcess) -> None:
    path = f"/v1/runs/{head.post('/v1/runs', RUN)['run_id']}"
    heard, begun = Counter[bytes](), asyncio.Event()

    async def follow(session: aiohttp.ClientSession) -> None:
        async with session.get(f"{head.url}{path}/groups?follow=true") as answer:
            heard[b"open"] += 1
            if heard[b"open"] == _READERS:
                begun.set()
            async for line in answer.content:
                if line.strip():  # no sign of life
                    heard[line.split(b",", 1)[1]] += 1

    headers = {"Authorization": f"Bearer {TOKEN}"}
    connector = aiohttp.TCPConnector(limit=0)
    open_files.allow_many()
    async with aiohttp.ClientSession(headers=headers, connector=connector) as session:
        readers = [asyncio.create_task(follow(session)) for _ in range(_READERS)]
        await asyncio.wait_for(begun.wait(), 60)
        await asyncio.to_thread(head.post, f"{path}/cancel")
        await asyncio.gather(*readers)
    assert heard[b'"end":{"state":"cancelled"}}\n'] == _READERS


def refusal(redis_url: str, folder: Path, *arguments: str, **variables: str) -> str:
    """Return the one sentence with which a head refuses to start."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        cwd=folder,
        env=Fleet(redis_url, folder).variables | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    *_, line = done.stderr.splitlines()
    return line.removeprefix("gym-queue: ")


def test_without_a_token_it_serves_this_machine_only(redis_url: str, tmp_path: Path) -> None:
    said = refusal(redis_url, tmp_path, "--host", "0.0.0.0")  # noqa: S104 - it is refused
    assert said.startswith("without a token the head listens on this machine only, not on 0.0.0.0")


def test_a_port_that_is_none(redis_url: str, tmp_path: Path) -> None:
    assert refusal(redis_url, tmp_path, "--port", "70000").startswith("the setting head_port cannot be used")


def test_a_redis_that_is_not_there(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/none.sock"
    said = refusal("redis://127.0.0.1:1/0", tmp_path, GYM_QUEUE_REDIS_URL=url)
    assert "does not answer" in said


def test_the_token_is_in_no_argument_and_no_log(head: HeadProcess) -> None:
    head.client.get("/v1/runs", headers={"Authorization": f"Bearer {TOKEN}x"})
    head.client.get(f"/v1/runs?token={TOKEN}")
    arguments = subprocess.run(
        ["ps", "-o", "args=", "-p", str(head.process.pid)],  # noqa: S607
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert TOKEN not in arguments
    assert TOKEN not in head.log.read_text()
