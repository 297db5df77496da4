"""What nobody should send gets a 4xx with a sentence, wherever it is sent."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.head.bodies import MOST_VALUES, read_json

if TYPE_CHECKING:
    from starlette.testclient import TestClient

    from tests.unit.head.played_head import PlayedRuns

JSON_ROUTES = ["/v1/runs", "/v1/models/versions", "/v1/servers"]

HOSTILE = {
    "nothing": b"",
    "half": b'{"model": "stub:"',
    "no JSON": b"model=stub:",
    "bytes": bytes(range(256)),
    "not UTF-8": '{"model": "ä"}'.encode("latin-1"),
    "UTF-16": '{"model": "stub:"}'.encode("utf-16"),
    "half a surrogate": b'{"model": "\\ud800"}',
    "NUL behind": b'{"model": "stub:"}\x00',
    "two texts": b'{"model": "stub:"}{"model": "stub:"}',
    "NaN": b'{"model": "stub:", "weight": NaN}',
    "infinite": b'{"model": "stub:", "weight": Infinity}',
    "infinite in disguise": b'{"model": "stub:", "weight": 1e999}',
    "infinite where anything goes": b'{"model": "stub:", "limits": {"queue_timeout": 1e999}}',
    "a number without end": b'{"model": "stub:", "samples": 1' + b"0" * 100_000 + b"}",
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep and whole": b'{"model": "stub:", "limits": {"a": ' + b"[" * 5000 + b"]" * 5000 + b"}}",
    "many values": b"[" + b"0," * (MOST_VALUES + 1) + b"0]",
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "text": b'"model"',
    "wrong types": b'{"model": {}, "samples": "many", "sampling": [], "name": 1, "url": 2, "kind": []}',
    "unknown fields": json.dumps({str(number): 0 for number in range(10_000)}).encode(),
    "a long unknown field": json.dumps({"x" * 900_000: 0}).encode(),
}


def sentence_of(answer: Any) -> str:
    assert 400 <= answer.status_code < 500, answer.text
    message: str = answer.json()["error"]["message"]
    assert message
    assert len(message) <= 500
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize("route", JSON_ROUTES)
@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_body(client: TestClient, runs: PlayedRuns, route: str, body: bytes) -> None:
    sentence_of(client.post(route, content=body, headers={"content-type": "application/json"}))
    assert runs.views == {}


@pytest.mark.parametrize(
    "kind", ["text/plain", "multipart/form-data; boundary=x", "application/xml", "", "/"]
)
def test_json_under_another_name(client: TestClient, kind: str) -> None:
    answer = client.post("/v1/runs", content=b'{"model": "stub:"}', headers={"content-type": kind})
    sentence_of(answer)


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", "application/vnd.x+json"]
)
def test_json_under_its_name(client: TestClient, kind: str) -> None:
    answer = client.post("/v1/runs", content=b'{"model": "stub:"}', headers={"content-type": kind})
    assert answer.status_code == 201


@pytest.mark.parametrize(
    "field",
    [
        {"priority": 10**30}, {"priority": -(10**30)}, {"samples": 10**12}, {"weight": 0}, {"weight": -1.0},
        {"environments": [{"name": "x", "size": 0}]}, {"environments": [{"name": "x", "size": 10**30}]},
        {"freshness": {"max_staleness": -1, "groups_per_version": 1}}, {"model": ""}, {"model": "x" * 10_000},
    ],
)  # fmt: skip
def test_a_number_that_means_nothing(client: TestClient, runs: PlayedRuns, field: dict[str, Any]) -> None:
    sentence_of(client.post("/v1/runs", json={"model": "stub:"} | field))
    assert runs.views == {}


@pytest.mark.parametrize("route", ["", "/rollouts", "/groups", "/metrics", "/failures"])
def test_ids_that_are_none(client: TestClient, route: str) -> None:
    for run_id in (
        *(
            "..",
            "%2e%2e",
            "..%2f..%2fetc%2fpasswd",
            "../../etc/passwd",
            "%00",
            "a%00b",
            ".hidden",
            "x" * 5000,
        ),
        *("a b", "%ff", "%ed%a0%80", "-rf", "a%0ab", "~", "*", "a%5c..%5cb", "x%2f..", "%e2%80%ae"),
    ):
        sentence_of(client.get(f"/v1/runs/{run_id}{route}"))


@pytest.mark.parametrize(
    "rollout", ["run", "run.0", "run.0.0.x", "run.-1.0", "run.0.1e3", "run.٣.0", "..0.0"]
)
def test_rollouts_that_are_none(client: TestClient, rollout: str) -> None:
    sentence_of(client.get(f"/v1/rollouts/{rollout}/why"))
    sentence_of(client.post(f"/v1/rollouts/{rollout}/cancel"))


@pytest.mark.parametrize("key", ["", " ", "x" * 201, "ä", "a\tb"])
def test_keys_that_are_none(client: TestClient, key: str) -> None:
    headers = {b"Idempotency-Key": key.encode()}
    sentence_of(client.post("/v1/runs", json={"model": "stub:"}, headers=headers))


def test_what_can_be_read() -> None:
    assert read_json(b'{"a": [1, 1.5, "\\u00e4", null, true]}') == {"a": [1, 1.5, "ä", None, True]}
    assert read_json(b"[" * 100 + b"]" * 100)
    with pytest.raises(ValueError, match="recursion limit"):
        read_json(b"[" * 300 + b"]" * 300)
