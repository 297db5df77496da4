"""What goes wrong has one shape, one sentence, and the right status; nothing shows the head's inside."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue import errors
from gym_queue.head.errors import TYPES

if TYPE_CHECKING:
    from starlette.testclient import TestClient

    from gym_queue.ledger.memory import MemoryLedger
    from tests.unit.head.played_head import PlayedRuns

RUN = {"model": "stub:"}


def error_of(answer: Any, status: int) -> str:
    """Check the shape of an error and return its sentence."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["error"]
    assert body["error"]["type"] == TYPES[status]
    message = body["error"]["message"]
    assert isinstance(message, str)
    assert message
    assert "\n" not in message
    assert len(message) <= 500
    return message


def test_a_route_that_does_not_exist(client: TestClient) -> None:
    assert "no such route" in error_of(client.get("/v1/nothing"), 404)


def test_a_method_that_a_route_does_not_know(client: TestClient) -> None:
    answer = client.delete("/v1/runs")
    assert "method" in error_of(answer, 405)
    assert set(answer.headers["allow"].split(", ")) >= {"GET"} or answer.headers["allow"] == "POST"


def test_a_run_that_does_not_exist(client: TestClient) -> None:
    assert error_of(client.get("/v1/runs/none"), 404) == "there is no run 'none'"


@pytest.mark.guarantee("G8")
def test_g8_a_key_with_another_body(client: TestClient) -> None:
    key = {"Idempotency-Key": "k"}
    assert client.post("/v1/runs", json=RUN, headers=key).status_code == 201
    assert client.post("/v1/runs", json=RUN, headers=key).status_code == 200
    assert "another body" in error_of(client.post("/v1/runs", json=RUN | {"samples": 2}, headers=key), 409)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "model: Field required"),
        (RUN | {"samples": 0}, "samples: Input should be greater than or equal to 1"),
        (RUN | {"sampels": 0}, "sampels: Extra inputs are not permitted"),
        (RUN | {"sampling": {"top_p": 2}}, "sampling.top_p: Input should be less than or equal to 1"),
        ([], "the body: Input should be a valid dictionary or object to extract fields from"),
    ],
)
def test_a_body_that_is_wrong_names_the_field(client: TestClient, body: object, sentence: str) -> None:
    assert error_of(client.post("/v1/runs", json=body), 422) == sentence


def test_more_than_one_field(client: TestClient) -> None:
    answer = client.post("/v1/runs", json={"samples": 0, "weight": 0})
    assert error_of(answer, 422).endswith("(and 2 more)")


def test_a_parameter_that_is_wrong(client: TestClient) -> None:
    assert error_of(client.get("/v1/runs?limit=0"), 422).startswith("limit: ")


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (errors.UsageError("the model is none"), 422, "the model is none"),
        (errors.EngineSetupError("no such model"), 422, "no such model"),
        (errors.UnknownRunError("there is no run 'x'"), 404, "there is no run 'x'"),
        (errors.ConflictError(), 409, "The same idempotency key was used with another body."),
    ],
)
def test_what_the_caller_did_is_told(
    client: TestClient, runs: PlayedRuns, error: Exception, status: int, sentence: str
) -> None:
    runs.failure = error
    assert error_of(client.post("/v1/runs", json=RUN), status) == sentence


@pytest.mark.parametrize(
    "error",
    [
        errors.LedgerError("redis-7.internal:6379 is away"),
        errors.RedisAwayError("redis-7.internal"),
        errors.DiskFullError("/internal/path"),
    ],
)
def test_what_passes_is_told_in_general_words(
    client: TestClient, runs: PlayedRuns, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    runs.failure = error
    answer = client.post("/v1/runs", json=RUN)
    assert "internal" not in error_of(answer, 503)
    assert int(answer.headers["retry-after"]) >= 1
    assert str(error) in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("secret: 1234"), errors.StorageError("/etc/secret")])
def test_what_broke_here_is_in_the_log_only(
    client: TestClient, runs: PlayedRuns, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    runs.failure = error
    with caplog.at_level(logging.ERROR):
        message = error_of(client.post("/v1/runs", json=RUN), 500)
    assert "secret" not in message
    reference = re.search(r"under ([0-9a-f]{8})$", message)
    assert reference
    assert f"{reference[1]}: POST /v1/runs failed" in caplog.text
    assert "secret" in caplog.text


def test_a_redis_that_is_away_makes_the_head_not_ready(
    client: TestClient, ledger: MemoryLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.get("/ready").json() == {"status": "ready"}

    async def away(_run_id: str) -> None:
        raise errors.LedgerError

    monkeypatch.setattr(ledger, "run", away)
    error_of(client.get("/ready"), 503)
    assert client.get("/health").json() == {"status": "ok"}
