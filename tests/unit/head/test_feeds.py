"""Feeds over HTTP: every line once, whoever reads, whenever it comes, however the reading ends."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.coordinator import manifest
from gym_queue.coordinator.archive import paths
from gym_queue.coordinator.group_log import GroupLine, GroupLog
from gym_queue.coordinator.manifest import Manifest
from gym_queue.coordinator.progress import ProgressFile, Written
from gym_queue.head import feeds
from gym_queue.records import RunSpec, RunState
from gym_queue.testing import async_wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from fastapi import FastAPI

    from gym_queue.head.services import HeadServices

RUN = "20261120-223109-4eeff0ca"


class PlayedRun:
    """The files of a run, as its coordinator writes them."""

    def __init__(self, folder: Path) -> None:
        self.paths = paths(folder / RUN / "rollouts.jsonl")
        manifest.write(
            self.paths.run_dir, Manifest(spec=RunSpec(run_id=RUN, model="stub:", samples=1), examples=0)
        )
        self.progress = ProgressFile(self.paths.run_dir)
        self.log = GroupLog(self.paths.run_dir).open(lambda _: None)
        self.written = Written()
        self.count = 0

    def end(self, *states: str) -> None:
        """Let rollouts end."""
        for state in states:
            path = self.paths.rows if state == "succeeded" else self.paths.failures
            with path.open("a") as file:
                file.write(json.dumps({"rollout_id": f"{RUN}.{self.count}.0", "state": state}) + "\n")
            self.count += 1
        sizes = [path.stat().st_size if path.exists() else 0 for path in self.paths[:2]]
        self.tell(rows=sizes[0], failures=sizes[1])

    def decide(self, *outcomes: Any) -> None:
        """Let groups be decided."""
        self.log.append(
            [
                GroupLine(run_id=RUN, example_id=str(index), example_index=index, outcome=outcome)
                for index, outcome in enumerate(outcomes)
            ]
        )
        self.tell(groups=self.log.length)

    def tell(self, **facts: Any) -> None:
        self.written = self.written.model_copy(update=facts)
        self.progress.write(lambda: self.written)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    played = PlayedRun(tmp_path)
    yield played
    played.log.close()


class Reader:
    """A client that reads an answer while it comes, and may leave."""

    def __init__(self, app: FastAPI, path: str) -> None:
        path, _, query = path.partition("?")
        self.status = 0
        self.text = b""
        self._gone = asyncio.Event()
        self._asked = False
        scope = {
            "type": "http", "asgi": {"spec_version": "2.3"}, "method": "GET", "path": path,
            "raw_path": path.encode(), "query_string": query.encode(), "headers": [], "scheme": "http",
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 11000), "http_version": "1.1",
            "root_path": "", "app": app,
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines() if line]

    async def has(self, count: int) -> list[dict[str, Any]]:
        """Wait for so many lines."""
        await async_wait_until(lambda: len(self.lines) >= count, what=f"{count} lines, of {self.text!r}")
        return self.lines

    async def whole(self) -> list[dict[str, Any]]:
        """Wait for the end of the answer."""
        await asyncio.wait_for(self.task, 10.0)
        assert self.text == b"" or self.text.endswith(b"\n")
        return self.lines

    async def leave(self) -> None:
        self._gone.set()
        await asyncio.wait_for(self.task, 10.0)

    async def _receive(self) -> dict[str, Any]:
        if self._asked:
            await self._gone.wait()
            return {"type": "http.disconnect"}
        self._asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        self.text += message.get("body", b"")


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[HeadServices]:
    async with app.router.lifespan_context(app):
        yield app.state.services


@pytest.fixture
async def app(make_app: Callable[..., FastAPI]) -> AsyncIterator[FastAPI]:
    app = make_app()
    async with serving(app):
        yield app


def ids(lines: list[dict[str, Any]]) -> list[str]:
    return [line["rollout"]["rollout_id"].split(".")[1] for line in lines if "rollout" in line]


END = {"state": "ended"}


async def test_what_is_there_is_read_from_any_line_on(app: FastAPI, run: PlayedRun) -> None:
    run.end("succeeded", "failed", "succeeded", "cancelled")
    lines = await Reader(app, f"/v1/runs/{RUN}/rollouts").whole()
    assert sorted(ids(lines)) == ["0", "1", "2", "3"]
    assert all(list(line) == ["cursor", "rollout"] for line in lines)
    for number, line in enumerate(lines):
        rest = await Reader(app, f"/v1/runs/{RUN}/rollouts?cursor={line['cursor']}").whole()
        assert rest == lines[number + 1 :]
    run.tell(state=RunState.ENDED)
    last = lines[-1]["cursor"]
    assert await Reader(app, f"/v1/runs/{RUN}/rollouts").whole() == [*lines, {"cursor": last, "end": END}]
    assert await Reader(app, f"/v1/runs/{RUN}/rollouts?cursor={last}").whole() == [
        {"cursor": last, "end": END}
    ]


async def test_no_more_than_asked_for(app: FastAPI, run: PlayedRun) -> None:
    run.end(*["succeeded"] * 5)
    run.tell(state=RunState.ENDED)
    first = await Reader(app, f"/v1/runs/{RUN}/rollouts?limit=2").whole()
    assert ids(first) == ["0", "1"]
    second = await Reader(
        app, f"/v1/runs/{RUN}/rollouts?limit=2&follow=true&cursor={first[-1]['cursor']}"
    ).whole()
    assert ids(second) == ["2", "3"]
    third = await Reader(app, f"/v1/runs/{RUN}/rollouts?limit=2&cursor={second[-1]['cursor']}").whole()
    assert (ids(third), third[-1]["end"]) == (["4"], END)


@pytest.mark.parametrize("lines", [1, 3, 1000])
async def test_many_pages_are_one_feed(
    app: FastAPI, run: PlayedRun, monkeypatch: pytest.MonkeyPatch, lines: int
) -> None:
    monkeypatch.setattr(feeds, "_PAGE_LINES", lines)
    monkeypatch.setattr(feeds, "_PAGE_BYTES", 300)
    run.end(*["succeeded"] * 50, *["failed"] * 50)
    assert len(set(ids(await Reader(app, f"/v1/runs/{RUN}/rollouts").whole()))) == 100
    assert len(await Reader(app, f"/v1/runs/{RUN}/rollouts?limit=70").whole()) == 70


async def test_a_feed_that_is_followed(app: FastAPI, run: PlayedRun) -> None:
    reader = Reader(app, f"/v1/runs/{RUN}/rollouts?follow=true")
    await async_wait_until(lambda: reader.status == 200)
    assert reader.lines == []
    run.end("succeeded")
    await reader.has(1)
    run.end("failed", "succeeded")
    lines = await reader.has(3)
    assert sorted(ids(lines)) == ["0", "1", "2"]
    run.tell(state=RunState.CANCELLED)
    assert (await reader.whole())[-1] == {"cursor": lines[-1]["cursor"], "end": {"state": "cancelled"}}


async def test_one_that_waits(app: FastAPI, run: PlayedRun) -> None:
    reader = Reader(app, f"/v1/runs/{RUN}/rollouts?wait=60")
    await async_wait_until(lambda: reader.status == 200)
    run.end("succeeded")
    assert ids(await reader.whole()) == ["0"]
    assert (
        await Reader(app, f"/v1/runs/{RUN}/rollouts?wait=0.05&cursor={reader.lines[0]['cursor']}").whole()
        == []
    )


async def test_a_sign_of_life(app: FastAPI, run: PlayedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "SIGN_OF_LIFE", 0.05)
    reader = Reader(app, f"/v1/runs/{RUN}/rollouts?follow=true")
    await async_wait_until(lambda: reader.text.startswith(b"\n\n"))
    run.end("succeeded")
    run.tell(state=RunState.ENDED)
    assert ids(await reader.whole()) == ["0"]


async def test_groups(app: FastAPI, run: PlayedRun) -> None:
    run.decide("complete", "uniform", "short", "complete", "stale")
    run.tell(state=RunState.ENDED)
    lines = await Reader(app, f"/v1/runs/{RUN}/groups?follow=true").whole()
    *groups, end = lines
    assert [line["group"]["outcome"] for line in groups] == ["complete", "complete"]
    assert end["end"] == END
    both = await Reader(app, f"/v1/runs/{RUN}/groups?dropped=true").whole()
    assert [line["group"]["outcome"] for line in both[:-1]] == [
        "complete",
        "uniform",
        "short",
        "complete",
        "stale",
    ]
    assert both[-1] == end
    rest = await Reader(app, f"/v1/runs/{RUN}/groups?cursor={groups[0]['cursor']}").whole()
    assert rest == lines[1:]


async def test_a_client_that_leaves_is_forgotten(app: FastAPI, run: PlayedRun) -> None:
    watchers = app.state.services.watchers
    readers = [Reader(app, f"/v1/runs/{RUN}/rollouts?follow=true") for _ in range(100)]
    await async_wait_until(lambda: watchers.users == 100)
    for reader in readers[1:]:
        await reader.leave()
    assert watchers.users == 1
    run.end("succeeded")
    await readers[0].has(1)
    await readers[0].leave()
    assert watchers.users == 0
    assert not watchers.is_looking


async def test_a_head_that_stops_ends_its_feeds_after_a_whole_line(app: FastAPI, run: PlayedRun) -> None:
    readers = [Reader(app, f"/v1/runs/{RUN}/rollouts?{what}") for what in ("follow=true", "wait=60")]
    await async_wait_until(lambda: app.state.services.watchers.users == 2)
    app.state.services.stop()
    assert [await reader.whole() for reader in readers] == [[], []]
    run.end("succeeded")
    assert ids(await Reader(app, f"/v1/runs/{RUN}/rollouts?follow=true").whole()) == ["0"]


@pytest.mark.parametrize(
    "query",
    ["cursor=1-0", "cursor=999999-0", "cursor=x", "cursor=0", "cursor=-1--1", "cursor=0-0&limit=0", "wait=61",
     "wait=-1", "wait=nan", "follow=perhaps", "cursor=999999999999999999-0", f"cursor={'9' * 50}-0"],
)  # fmt: skip
async def test_what_is_no_cursor(app: FastAPI, run: PlayedRun, query: str) -> None:
    run.end("succeeded")
    reader = Reader(app, f"/v1/runs/{RUN}/rollouts?{query}")
    await asyncio.wait_for(reader.task, 10.0)
    assert reader.status == 422
    assert json.loads(reader.text)["error"]["message"]


@pytest.mark.parametrize("kind", ["rollouts", "groups"])
async def test_a_run_that_is_not_there(app: FastAPI, kind: str) -> None:
    reader = Reader(app, f"/v1/runs/{RUN}/{kind}?follow=true")
    await asyncio.wait_for(reader.task, 10.0)
    assert reader.status == 404


async def test_a_file_that_cannot_be_read_breaks_the_feed(app: FastAPI, run: PlayedRun) -> None:
    reader = Reader(app, f"/v1/runs/{RUN}/rollouts?follow=true")
    await async_wait_until(lambda: app.state.services.watchers.users == 1)
    run.paths.rows.mkdir()
    run.tell(rows=100)
    with pytest.raises(RuntimeError, match="response already started"):
        await reader.whole()
    assert b"end" not in reader.text
