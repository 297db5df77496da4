"""The port of a worker: who asks gets an answer, whatever else goes on."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import pytest

from gym_queue.telemetry import catalogue, port
from gym_queue.telemetry.exposition import CONTENT_TYPE
from gym_queue.telemetry.port import Port
from tests.unit.prometheus import samples

if TYPE_CHECKING:
    from collections.abc import Iterator


class Owner:
    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.breaks = False

    def trouble(self) -> list[str]:
        return self.reasons

    def families(self) -> list[catalogue.Family]:
        if self.breaks:
            raise ValueError("secret details")
        return [catalogue.READY.family().add(1, "gpu")]


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
def opened(owner: Owner) -> Iterator[Port]:
    opened = Port(owner.trouble, owner.families)
    opened.open("127.0.0.1", free_port())
    yield opened
    opened.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        number: int = probe.getsockname()[1]
    return number


def get(url: str) -> tuple[int, str, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own
            return answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read()


def test_health_and_metrics(opened: Port) -> None:
    status, content_type, body = get(f"{opened.url}/health")
    assert (status, content_type, json.loads(body)) == (200, "application/json", {"status": "ok"})
    status, content_type, body = get(f"{opened.url}/metrics?name=x")
    assert (status, content_type) == (200, CONTENT_TYPE)
    assert samples(body)["gym_queue_ready{role=gpu}"] == 1


def test_who_is_not_ready_says_why(opened: Port, owner: Owner) -> None:
    assert get(f"{opened.url}/ready")[0] == 200
    owner.reasons = ["the broker is not connected"]
    status, _, body = get(f"{opened.url}/ready")
    assert (status, json.loads(body)) == (503, {"ready": False, "because": ["the broker is not connected"]})


def test_what_is_not_there_and_what_fails_is_one_sentence(
    opened: Port, owner: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    assert get(f"{opened.url}/secret")[0] == 404
    owner.breaks = True
    status, _, body = get(f"{opened.url}/metrics")
    assert (status, json.loads(body)["error"]["type"]) == (500, "internal")
    assert b"details" not in body
    assert "secret details" in caplog.text
    assert get(f"{opened.url}/health")[0] == 200


def test_a_client_that_says_nothing_holds_up_nobody(opened: Port) -> None:
    host, number = opened.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(number))):
        assert get(f"{opened.url}/health")[0] == 200


def test_a_port_that_is_taken_gives_way_to_the_next(opened: Port, owner: Owner) -> None:
    first = int(opened.url.rpartition(":")[2])
    other = Port(owner.trouble, owner.families)
    other.open("127.0.0.1", first)
    try:
        number = int(other.url.rpartition(":")[2])
        assert first < number < first + port.PORTS
        assert get(f"{other.url}/health")[0] == 200
    finally:
        other.close()


def test_without_a_free_port_the_log_says_so_and_work_goes_on(
    opened: Port, owner: Owner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(port, "PORTS", 1)
    other = Port(owner.trouble, owner.families)
    with caplog.at_level(logging.WARNING):
        other.open("127.0.0.1", int(opened.url.rpartition(":")[2]))
    assert other.url == ""
    assert "no /health, /ready and /metrics here" in caplog.text
    other.close()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns of threads
def test_a_child_does_not_keep_the_port(owner: Owner) -> None:
    """A parent that is killed must find its port free when it starts again, though a child lives on."""
    opened = Port(owner.trouble, owner.families)
    opened.open("127.0.0.1", free_port())
    number = int(opened.url.rpartition(":")[2])
    hear, tell = os.pipe()
    child = os.fork()
    if not child:
        os.write(tell, b"!")
        signal.pause()
    os.read(hear, 1)
    opened.close()
    again = Port(owner.trouble, owner.families)
    again.open("127.0.0.1", number)
    try:
        assert again.url.endswith(f":{number}")
    finally:
        again.close()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(hear)
        os.close(tell)


def test_ipv6_addresses_are_spelled_right(owner: Owner) -> None:
    opened = Port(owner.trouble, owner.families)
    opened.open("::1", free_port())
    try:
        assert opened.url.startswith("http://[::1]:")
        assert get(f"{opened.url}/health")[0] == 200
    finally:
        opened.close()
