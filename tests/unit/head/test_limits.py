"""How much one client may ask for: requests in a time, bytes in a body, time to send it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from starlette.testclient import TestClient

from gym_queue.head import limits
from gym_queue.head.bodies import MOST_VALUES
from gym_queue.head.limits import LARGEST_PLAIN_BODY, MOST_ADDRESSES, BodyLimit, Buckets, network_of
from gym_queue.head.runs import MOST_LINES
from gym_queue.testing import async_wait_until
from tests.unit.head.played_head import HERE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastapi import FastAPI

    from tests.unit.head.played_head import PlayedRuns

RUN = {"model": "stub:"}


# --- requests in a time -----------------------------------------------------------------------------------


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_is_taken_then_the_rate() -> None:
    clock = Clock()
    buckets = Buckets(10.0, clock)
    assert [buckets.take("a") for _ in range(20)] == [0.0] * 20
    assert buckets.take("a") == pytest.approx(0.1)
    assert buckets.take("b") == 0.0
    clock.now += 0.1
    assert buckets.take("a") == 0.0
    assert buckets.take("a") > 0.0
    clock.now += 3600
    assert [buckets.take("a") for _ in range(20)] == [0.0] * 20, "what was not used is not saved up"
    assert buckets.take("a") > 0.0


def test_a_rate_below_one_takes_one_at_once() -> None:
    clock = Clock()
    buckets = Buckets(0.1, clock)
    assert buckets.take("a") == 0.0
    assert buckets.take("a") == pytest.approx(10.0)


def test_addresses_are_forgotten() -> None:
    buckets = Buckets(1.0, Clock())
    for number in range(MOST_ADDRESSES + 100):
        buckets.take(str(number))
    assert len(buckets) == MOST_ADDRESSES


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9%eth0", "2001:db8:1:2::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("testclient", "testclient"),
    ],
)
def test_what_a_client_cannot_choose_of_its_address(host: str, network: str) -> None:
    assert network_of(host) == network


def test_too_many_requests_are_answered_429(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(rate_limit=0.5), HERE) as client:
        assert client.get("/v1/runs").status_code == 200
        answer = client.get("/v1/runs")
        assert answer.status_code == 429
        assert answer.json()["error"]["type"] == "too_many_requests"
        assert int(answer.headers["retry-after"]) in (1, 2)
        assert client.get("/health").status_code == 200, "probes are not counted"


def test_wrong_tokens_are_counted_too(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(rate_limit=0.5, auth_token="t"), HERE) as client:  # noqa: S106
        assert [client.get("/v1/runs").status_code for _ in range(2)] == [401, 429]


def test_no_limit(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(rate_limit=0.0), HERE) as client:
        assert {client.get("/v1/runs").status_code for _ in range(50)} == {200}


# --- bytes in a body --------------------------------------------------------------------------------------


@pytest.fixture
def run_id(client: TestClient) -> str:
    found: str = client.post("/v1/runs", json=RUN).json()["run_id"]
    return found


def chunks(size: int) -> Iterator[bytes]:
    """Yield a body without a length."""
    for _ in range(size // 1024 + 1):
        yield b" " * 1024


def refused(answer: Any) -> str:
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "too_large"
    sentence: str = answer.json()["error"]["message"]
    return sentence


def test_a_body_that_is_too_large(client: TestClient) -> None:
    assert "1,048,576 bytes" in refused(client.post("/v1/runs", content=b" " * (LARGEST_PLAIN_BODY + 1)))


def test_one_without_a_length_is_cut_off(client: TestClient) -> None:
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/runs", content=chunks(LARGEST_PLAIN_BODY), headers=headers)
    assert "too large" in refused(answer)


@pytest.mark.parametrize("length", ["99999999999999999999999999", "1" * 4000])
def test_a_length_that_lies(client: TestClient, length: str) -> None:
    refused(client.post("/v1/runs", content=b"{}", headers={"content-length": length}))


def test_examples_may_be_larger(make_app: Callable[..., FastAPI], runs: PlayedRuns) -> None:
    with TestClient(make_app(max_request_bytes=3 << 20), HERE) as client:
        run_id = client.post("/v1/runs", json=RUN).json()["run_id"]
        row = b'{"prompt": "%s"}\n' % (b"x" * LARGEST_PLAIN_BODY)
        assert client.post(f"/v1/runs/{run_id}/examples", content=2 * row).json() == {"examples": 2}
        assert "3,145,728" in refused(client.post(f"/v1/runs/{run_id}/examples", content=3 * row))
        assert "too large" in refused(client.post(f"/v1/runs/{run_id}/examples", content=chunks(3 << 20)))
    assert runs.views[run_id].examples == 2


def test_a_smaller_limit_is_for_all_bodies(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(max_request_bytes=2048), HERE) as client:
        assert "2,048" in refused(client.post("/v1/runs", content=b" " * 2049))


def test_more_lines_than_are_read_at_once(client: TestClient, run_id: str) -> None:
    answer = client.post(f"/v1/runs/{run_id}/examples", content=b"\n" * (MOST_LINES + 1))
    assert "several requests" in refused(answer)


def test_a_line_that_would_take_long(client: TestClient, run_id: str) -> None:
    line = b'{"a": [' + b"[]," * (MOST_VALUES // 2) + b"[]]}"
    assert "line 2: more than" in refused(client.post(f"/v1/runs/{run_id}/examples", content=b"{}\n" + line))


# --- time to send it --------------------------------------------------------------------------------------


class Silent:
    """The rest of a body that does not come, and what the head answers meanwhile."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = list(parts)
        self.answered: list[Any] = []

    async def receive(self) -> dict[str, Any]:
        if not self.parts:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": self.parts.pop(0), "more_body": True}

    async def send(self, message: Any) -> None:
        self.answered.append(message)


@pytest.mark.parametrize(("pause", "whole"), [(0.01, 60.0), (60.0, 0.01)])
async def test_a_body_that_does_not_come_is_not_waited_for(
    make_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch, pause: float, whole: float
) -> None:
    monkeypatch.setattr(BodyLimit.__init__, "__defaults__", (pause, whole))
    app = make_app()
    scope = {
        "type": "http", "method": "POST", "path": "/v1/runs", "raw_path": b"/v1/runs", "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "scheme": "http",
        "server": ("127.0.0.1", 11000), "http_version": "1.1", "root_path": "",
    }  # fmt: skip
    silent = Silent(b'{"model"')
    async with app.router.lifespan_context(app):
        await app(scope, silent.receive, silent.send)
    assert silent.answered[0]["status"] == 408
    assert b"did not come in time" in silent.answered[1]["body"]


async def test_large_bodies_wait_for_each_other() -> None:
    gate, inside = asyncio.Event(), []

    async def app(scope: Any, *_: Any) -> None:
        inside.append(scope)
        await gate.wait()

    limit = BodyLimit(app, 1000)
    scope = {"type": "http", "method": "POST", "path": "/v1/runs/x/examples", "headers": []}
    silent = Silent()
    tasks = [asyncio.create_task(limit(scope, silent.receive, silent.send)) for _ in range(9)]
    await async_wait_until(lambda: len(inside) == limits._MOST_LARGE_BODIES)
    gate.set()
    await asyncio.gather(*tasks)
    assert len(inside) == 9
