"""A head that is played: it speaks as the real one, ends every rollout at once, and fails as it is told."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web

from gym_queue.api import RunRequest, RunView
from gym_queue.client.background import BackgroundLoop
from gym_queue.records import Limits, RunSpec, RunState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

TOKEN = "open sesame"  # noqa: S105 - a played one


@dataclass
class PlayedRun:
    """A run: what was asked for, and what its feeds say so far."""

    run_id: str
    request: RunRequest
    examples: list[dict[str, Any]] = field(default_factory=list)
    closed: bool = False
    state: RunState = RunState.OPEN
    rollouts: list[bytes] = field(default_factory=list)
    groups: list[bytes] = field(default_factory=list)
    bodies: list[int] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return self.closed and self.state is not RunState.PAUSED

    def view(self) -> RunView:
        request = self.request.model_dump(exclude={"environment", "environments", "limits"})
        return RunView(
            run_id=self.run_id,
            state=RunState.ENDED if self.complete and self.state is RunState.OPEN else self.state,
            closed=self.closed,
            examples=len(self.examples),
            succeeded=len(self.rollouts),
            spec=RunSpec(run_id=self.run_id, limits=Limits(**self.request.limits), **request),
        )

    def end(self, index: int) -> None:
        """Let all samples of an example end."""
        rows = [self._row(index, sample) for sample in range(self.request.samples)]
        for row in rows:
            cursor = f"{len(self.rollouts) + 1}-0"
            self.rollouts.append(json.dumps({"cursor": cursor, "rollout": row}).encode())
        group = {
            "run_id": self.run_id,
            "example_id": rows[0]["example_id"],
            "example_index": index,
            "outcome": "complete",
            "weight_version": None,
            "rollouts": rows,
        }
        self.groups.append(json.dumps({"cursor": str(len(self.groups) + 1), "group": group}).encode())

    def _row(self, index: int, sample: int) -> dict[str, Any]:
        fails = self.examples[index].get("fails")
        row = {
            "version": 1,
            "run_id": self.run_id,
            "rollout_id": f"{self.run_id}.{index}.{sample}",
            "example_id": self.examples[index].get("id", f"row-{index + 1}"),
            "example_index": index,
            "sample_index": sample,
            "attempt": 1,
            "environment": "rows",
            "model": self.request.model,
            "state": "failed" if fails else "succeeded",
            "messages": [{"role": "assistant", "content": "x" * self.examples[index].get("length", 1)}],
            "trajectory": None,
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 1, "completion_tokens": 1},
            "turns": 1,
            "timings": {"accepted_at": 1.0, "ended_at": 2.0},
            "colour": self.examples[index].get("colour", "none"),
        }
        if fails:
            return row | {"class": "verifier", "stage": "verify", "error": "no idea"}
        return row | {"reward": float(sample % 2), "metrics": {}}


class FakeHead:
    """The played head.

    Attributes:
        statuses: the next requests are answered with these, and not done.
        lost: POSTs to routes that end so are done once, and their answers get lost.
        cuts: the next feeds break in the middle of their n-th line.
        mute: feeds say nothing at all, not even a sign of life.
        wrong_cursors: no feed has these.
        held: examples wait for ``release`` before they end.
        seen: method and path of each request.
    """

    def __init__(self) -> None:
        self.runs: dict[str, PlayedRun] = {}
        self.keys: dict[str, str] = {}
        self.versions: dict[str, dict[str, Any]] = {}
        self.servers: dict[str, dict[str, Any]] = {}
        self.statuses: list[int] = []
        self.lost: set[str] = set()
        self.cuts: list[int] = []
        self.mute = 0
        self.held = False
        self.wrong_cursors: set[str] = set()
        self.seen: list[str] = []
        self.heartbeat_interval = 0.02
        self.alive = 0.05
        self.port = 0
        self._news = asyncio.Event()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen, on the same port as before."""
        app = web.Application(middlewares=[self._gate], client_max_size=1 << 26)
        app.add_routes(
            [
                web.post("/v1/runs", self._create),
                web.get("/v1/runs", self._list),
                web.get("/v1/runs/{run}", self._show),
                web.post("/v1/runs/{run}/examples", self._append),
                web.post("/v1/runs/{run}/{what:close|cancel|pause|resume}", self._order),
                web.get("/v1/runs/{run}/{feed:rollouts|groups}", self._feed),
                web.get("/v1/runs/{run}/metrics", self._metrics),
                web.get("/v1/runs/{run}/failures", self._failures),
                web.get("/v1/rollouts/{rollout}/why", self._why),
                web.get("/v1/workers", self._workers),
                web.post("/v1/models/versions", self._announce),
                web.get("/v1/models/versions", self._versions),
                web.post("/v1/servers", self._register),
                web.get("/v1/servers", self._servers),
                web.post("/v1/servers/{id}/heartbeat", self._heartbeat),
                web.delete("/v1/servers/{id}", self._deregister),
            ]
        )
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Die: all connections break."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    def release(self) -> None:
        """Let the examples that were held end."""
        self.held = False
        for run in self.runs.values():
            for index in range(len(run.groups), len(run.examples)):
                run.end(index)
        self.tell()

    def tell(self) -> None:
        """Wake the feeds up."""
        self._news.set()
        self._news = asyncio.Event()

    @web.middleware
    async def _gate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.seen.append(f"{request.method} {request.path}")
        if self.statuses and (status := self.statuses.pop(0)):
            headers = {"Retry-After": "0"} if status == 429 else {}
            return error(status, f"told to say {status}", headers)
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return error(401, "a token is needed")
        if "run" in request.match_info and request.match_info["run"] not in self.runs:
            return error(404, f"there is no run {request.match_info['run']!r}")
        response: web.StreamResponse = await handler(request)
        route = request.path.rpartition("/")[2]
        if request.method == "POST" and route in self.lost:
            self.lost.remove(route)
            assert request.transport is not None
            request.transport.abort()
        return response

    async def _create(self, request: web.Request) -> web.Response:
        key, asked = request.headers["Idempotency-Key"], RunRequest.model_validate(await request.json())
        if key in self.keys:
            run = self.runs[self.keys[key]]
            if run.request != asked:
                return error(409, "the same idempotency key was used with another body")
            return view(run)
        run = PlayedRun(f"run-{len(self.runs)}", asked)
        self.runs[run.run_id], self.keys[key] = run, run.run_id
        if asked.environments:
            run.closed = True
            run.examples = [{} for part in asked.environments for _ in range(part.size)]
            self.release()
        return view(run, 201)

    async def _list(self, request: web.Request) -> web.Response:
        views = [run.view() for run in self.runs.values()]
        wanted = [v for v in views if v.state == request.query.get("state", v.state)]
        return web.json_response({"runs": [v.model_dump(mode="json") for v in wanted]})

    async def _show(self, request: web.Request) -> web.Response:
        return view(self.runs[request.match_info["run"]])

    async def _append(self, request: web.Request) -> web.Response:
        run, body = self.runs[request.match_info["run"]], await request.read()
        offset = int(request.query["offset"])
        rows = [json.loads(line) for line in body.splitlines()]
        run.bodies.append(len(rows))
        for number, row in enumerate(rows, 1):
            if "prompt" not in row:
                return error(422, f"line {number}: the row has neither prompt nor messages")
        known = min(len(run.examples) - offset, len(rows))
        if known < 0 or run.examples[offset : offset + known] != rows[:known]:
            return error(409, "the run has other examples there")
        if run.closed and rows[known:]:
            return error(409, "the run is closed")
        run.examples += rows[known:]
        if not self.held:
            self.release()
        return web.json_response({"examples": len(run.examples)})

    async def _order(self, request: web.Request) -> web.Response:
        run = self.runs[request.match_info["run"]]
        match request.match_info["what"]:
            case "close":
                run.closed = True
            case "cancel":
                run.closed, run.state = True, RunState.CANCELLED
            case "pause":
                run.state = RunState.PAUSED
            case "resume":
                run.state = RunState.OPEN
        self.tell()
        return view(run)

    async def _feed(self, request: web.Request) -> web.StreamResponse:
        run = self.runs[request.match_info["run"]]
        lines = run.rollouts if request.match_info["feed"] == "rollouts" else run.groups
        assert request.query["follow"] == "true"
        if request.query.get("cursor") in self.wrong_cursors:
            return error(422, "this is no cursor of this run")
        place = int(request.query.get("cursor", "0").partition("-")[0])
        cut = self.cuts.pop(0) if self.cuts else None
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        if self.mute:
            self.mute -= 1
            await asyncio.Event().wait()
        sent = 0
        while True:
            news = self._news
            while place < len(lines):
                if sent == cut:
                    await response.write(lines[place][: len(lines[place]) // 2])
                    assert request.transport is not None
                    request.transport.close()
                    return response
                await response.write(lines[place] + b"\n")
                place, sent = place + 1, sent + 1
            if run.complete and len(run.groups) == len(run.examples):
                break
            try:
                async with asyncio.timeout(self.alive):
                    await news.wait()
            except TimeoutError:
                await response.write(b"\n")
        end = {"cursor": str(place), "end": {"state": run.view().state}}
        await response.write(json.dumps(end).encode() + b"\n")
        await response.write_eof()
        return response

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.json_response({"rollouts": {"ended": len(self.runs[request.match_info["run"]].rollouts)}})

    async def _failures(self, request: web.Request) -> web.Response:
        rows = [json.loads(line)["rollout"] for line in self.runs[request.match_info["run"]].rollouts]
        wanted = request.query.get("class")
        failed = [row for row in rows if row["state"] == "failed" and wanted in (None, row["class"])]
        return web.json_response({"failures": failed[: int(request.query["limit"])]})

    async def _why(self, request: web.Request) -> web.Response:
        return web.json_response({"why": f"{request.match_info['rollout']} has ended"})

    async def _workers(self, _request: web.Request) -> web.Response:
        return web.json_response({"workers": [{"worker": "gpu@here", "healthy": True}]})

    async def _announce(self, request: web.Request) -> web.Response:
        weights = await request.json()
        known = self.versions.get(weights["model"])
        if known is not None and known["version"] >= weights["version"]:
            return error(409, f"version {known['version']} was announced already")
        self.versions[weights["model"]] = weights
        return web.json_response(weights, status=201)

    async def _versions(self, request: web.Request) -> web.Response:
        known = self.versions.get(request.query["model"])
        return web.json_response({"versions": [known] if known else []})

    async def _register(self, request: web.Request) -> web.Response:
        server = await request.json()
        identity = f"server-{server['name']}-{server['url'].rpartition(':')[2]}"
        self.servers[identity] = server | {"id": identity, "healthy": True, "beats": 0}
        return web.json_response(self._lease(identity), status=201)

    async def _heartbeat(self, request: web.Request) -> web.Response:
        identity = request.match_info["id"]
        if identity not in self.servers:
            return error(404, "no such server is registered (any more): register it again")
        self.servers[identity]["beats"] += 1
        return web.json_response(self._lease(identity))

    def _lease(self, identity: str) -> dict[str, Any]:
        return {"id": identity, "heartbeat_interval": self.heartbeat_interval, "timeout": 1.0}

    async def _servers(self, request: web.Request) -> web.Response:
        wanted = [server for server in self.servers.values() if server["name"] == request.query["name"]]
        return web.json_response({"servers": wanted})

    async def _deregister(self, request: web.Request) -> web.Response:
        self.servers.pop(request.match_info["id"], None)
        return web.Response(status=204)


def questions(count: int) -> list[dict[str, Any]]:
    return [{"id": str(number), "prompt": f"{number} + 1?", "answer": "?"} for number in range(count)]


def error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response(
        {"error": {"type": "played", "message": message}}, status=status, headers=headers or {}
    )


def view(run: PlayedRun, status: int = 200) -> web.Response:
    return web.json_response(run.view().model_dump(mode="json"), status=status)


@contextmanager
def playing_beside() -> Iterator[FakeHead]:
    """Play a head in a thread of its own."""
    head = FakeHead()
    loop = BackgroundLoop(head.stop)
    loop.call(head.start())
    try:
        yield head
    finally:
        loop.close()


@asynccontextmanager
async def playing() -> AsyncIterator[FakeHead]:
    """Play a head that listens."""
    head = FakeHead()
    await head.start()
    try:
        yield head
    finally:
        await head.stop()
