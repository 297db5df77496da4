"""Workers and servers: who is there, how servers come and go, and that neither is taken for the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml
from starlette.testclient import TestClient

from gym_queue.api import ServerRequest
from gym_queue.fleet import registry
from gym_queue.maintenance.reap import reap
from gym_queue.settings import Settings
from tests.unit.head.played_head import HERE

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI

    from gym_queue.ledger.base import Lease, Ledger
    from gym_queue.ledger.memory import MemoryLedger

SERVER = {
    "name": "policy",
    "kind": "responses_api_models",
    "url": "http://node-7:8000",
    "node": "node-7",
    "versions": {"vllm": "0.12"},
    "capacity": 256,
}
WORKER = {"kind": "gpu", "node": "node-1", "slots": "256", "used": "3", "pid": "17"}


def register(client: TestClient, **fields: Any) -> str:
    answer = client.post("/v1/servers", json=SERVER | fields)
    assert answer.status_code == 201, answer.text
    found: str = answer.json()["id"]
    return found


def servers(client: TestClient, **params: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/v1/servers", params=params).json()["servers"]
    return found


def test_a_server_comes_and_goes(client: TestClient) -> None:
    answer = client.post("/v1/servers", json=SERVER).json()
    assert answer == {"id": answer["id"], "heartbeat_interval": 30.0, "timeout": 300.0}
    (found,) = servers(client)
    assert {name: found[name] for name in SERVER} == SERVER
    assert found["healthy"]
    assert found["age"] < 30
    assert client.post(f"/v1/servers/{answer['id']}/heartbeat").json() == answer
    assert client.delete(f"/v1/servers/{answer['id']}").status_code == 204
    assert servers(client) == []
    assert client.delete(f"/v1/servers/{answer['id']}").status_code == 204
    gone = client.post(f"/v1/servers/{answer['id']}/heartbeat")
    assert gone.status_code == 404
    assert "register it again" in gone.json()["error"]["message"]


def test_the_same_server_again_is_the_same(client: TestClient) -> None:
    first = register(client)
    assert register(client, capacity=1) == first
    (found,) = servers(client)
    assert found["capacity"] == 1
    others = {
        register(client, name="judge"),
        register(client, url="http://node-8:8000"),
        register(client, kind="x"),
    }
    assert len(others | {first}) == 4


def test_servers_of_a_name(client: TestClient) -> None:
    register(client)
    judge = register(client, name="judge")
    assert [server["id"] for server in servers(client, name="judge")] == [judge]
    assert servers(client, name="nobody") == []


def aged(ledger: MemoryLedger, monkeypatch: pytest.MonkeyPatch, ages: dict[str, float]) -> None:
    """Let leases be that old."""
    ask = ledger.leases

    async def leases() -> list[Lease]:
        return [lease.model_copy(update={"age": ages.get(lease.worker, lease.age)}) for lease in await ask()]

    monkeypatch.setattr(ledger, "leases", leases)


def test_the_healthy_come_first_and_the_dead_not_at_all(
    client: TestClient, ledger: MemoryLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [register(client, url=f"http://node-{number}:8000") for number in range(4)]
    aged(ledger, monkeypatch, dict(zip(ids, (80.0, 20.0, 301.0, 10.0), strict=True)))
    assert [(server["id"], server["healthy"]) for server in servers(client)] == [
        (ids[3], True),
        (ids[1], True),
        (ids[0], False),
    ]
    assert client.post(f"/v1/servers/{ids[2]}/heartbeat").status_code == 404


class Nobody:
    async def publish(self, tickets: object) -> None:
        raise AssertionError


async def test_a_sweep_forgets_a_server_that_is_silent(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    servers = registry.Registry(ledger, heartbeat_interval=30, timeout=300)
    identity = await servers.register(ServerRequest.model_validate(SERVER))
    await reap(ledger, Nobody(), worker_timeout=0.0)
    assert await ledger.leases() == []
    assert f"server {identity} was silent" in caplog.text
    assert not await servers.renew(identity)


def test_only_so_many(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MOST_SERVERS", 2)
    register(client)
    register(client, name="judge")
    register(client, name="judge")
    answer = client.post("/v1/servers", json=SERVER | {"name": "third"})
    assert answer.status_code == 422
    assert "no more are taken" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "url",
    ["", "node-7:8000", "ftp://node-7", "file:///etc/passwd", "http://", "http://:8000", "http://n:0",
     "http://n:x", "http://n:99999", "javascript:alert(1)", "http://user@node", "http://:secret@node",
     "http://n/?key=secret", "http://n/#x", "http://n/a b", "http://n/\n", "http://[::1", "http://n/\x00",
     "//node", "http://n/" + "x" * 3000, "http://n\\@evil/", "unix:///tmp/socket", "redis://n"],
)  # fmt: skip
def test_addresses_that_are_none(client: TestClient, url: str) -> None:
    answer = client.post("/v1/servers", json=SERVER | {"url": url})
    assert answer.status_code == 422, answer.json()
    assert answer.json()["error"]["message"].startswith("url: ")
    assert "secret" not in answer.text
    assert servers(client) == []


@pytest.mark.parametrize(
    "fields",
    [{"name": ""}, {"name": "a/b"}, {"name": "a b"}, {"name": "../x"}, {"kind": ""}, {"capacity": 0},
     {"capacity": 10**12}, {"versions": {"a": "x" * 1000}}, {"versions": {str(n): "" for n in range(100)}},
     {"node": "x" * 300}],
)  # fmt: skip
def test_servers_that_are_none(client: TestClient, fields: dict[str, Any]) -> None:
    assert client.post("/v1/servers", json=SERVER | fields).status_code == 422


# --- workers ----------------------------------------------------------------------------------------------


@pytest.fixture
async def fleet(ledger: MemoryLedger) -> None:
    await ledger.heartbeat("gpu-1", WORKER)
    await ledger.heartbeat("new", {})


@pytest.mark.usefixtures("fleet")
def test_workers(client: TestClient) -> None:
    register(client)
    unknown, worker = client.get("/v1/workers").json()["workers"]
    assert worker.pop("age") < 30
    worker["info"].pop("worker", None)
    assert worker == {
        "worker": "gpu-1", "kind": "gpu", "node": "node-1", "healthy": True, "slots": 256, "used": 3,
        "info": WORKER,
    }  # fmt: skip
    assert (unknown["worker"], unknown["kind"], unknown["slots"]) == ("new", None, None)


@pytest.mark.usefixtures("fleet")
def test_a_worker_is_no_server(client: TestClient) -> None:
    assert servers(client) == []
    for name in ("gpu-1", "new"):
        assert client.delete(f"/v1/servers/{name}").status_code == 422
        assert client.post(f"/v1/servers/{name}/heartbeat").status_code == 422
    assert len(client.get("/v1/workers").json()["workers"]) == 2


async def test_nor_is_one_whose_name_looks_like_a_servers(ledger: MemoryLedger) -> None:
    name = "server-0123456789abcdef"
    await ledger.heartbeat(name, WORKER)
    servers = registry.Registry(ledger, heartbeat_interval=30, timeout=300)
    await servers.drop(name)
    assert not await servers.renew(name)
    assert [lease.worker for lease in await ledger.leases()] == [name]


# --- weights ----------------------------------------------------------------------------------------------


def test_weights_are_announced_in_order(client: TestClient) -> None:
    model = {"model": "hf:Qwen/Qwen3-0.6B"}
    assert client.get("/v1/models/versions", params=model).json() == {"versions": []}
    for version in (3, 7):
        weights = model | {"version": version, "uri": f"/weights/{version}"}
        answer = client.post("/v1/models/versions", json=weights)
        assert (answer.status_code, answer.json()) == (201, weights)
    for version in (7, 3):
        answer = client.post("/v1/models/versions", json=model | {"version": version})
        assert answer.status_code == 409
        assert (
            answer.json()["error"]["message"]
            == f"version 7 of this model was announced already: {version} is not newer"
        )
    newest = model | {"version": 7, "uri": "/weights/7"}
    assert client.get("/v1/models/versions", params=model).json() == {"versions": [newest]}


# --- what NeMo Gym asks -----------------------------------------------------------------------------------


def test_nemo_gyms_list_of_servers(client: TestClient) -> None:
    register(client)
    register(client, name="judge", url="https://judge.example.org/v1")
    instances = {found["name"]: found for found in client.get("/server_instances").json()}
    policy = instances["policy"]
    assert policy["uptime_seconds"] >= 0
    assert policy["start_time"] > 1e9
    assert {
        name: policy[name] for name in ("process_name", "server_type", "name", "host", "port", "url")
    } == {
        "process_name": "policy",
        "server_type": "responses_api_models",
        "name": "policy",
        "host": "node-7",
        "port": 8000,
        "url": "http://node-7:8000",
    }
    assert instances["judge"]["port"] == 443
    fields = {
        *(
            "config_path",
            "dir_path",
            "entrypoint",
            "host",
            "name",
            "pid",
            "port",
            "process_name",
            "server_type",
        ),
        *("start_time", "status", "uptime_seconds", "url"),
    }
    assert set(policy) == fields, "NeMo Gym's ServerInstanceDisplayConfig"


def first_server_config(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Find a server as NeMo Gym's clients do: the first value of the first value of what has its name."""
    found: dict[str, Any] = next(iter(next(iter(config[name].values())).values()))
    return found


def test_nemo_gyms_configuration(client: TestClient) -> None:
    register(client)
    text = client.get("/global_config_dict_yaml").json()
    assert isinstance(text, str), "a YAML text inside a JSON string"
    config = yaml.safe_load(text)
    assert set(config) == {"head_server", "policy"}
    assert set(config["head_server"]) == {"host", "port"}
    assert list(config["policy"]) == ["responses_api_models"]
    server = first_server_config(config, "policy")
    assert (server["host"], server["port"]) == ("node-7", 8000)


def test_its_configuration_has_no_secrets(make_app: Callable[..., FastAPI]) -> None:
    secrets = {"auth_token": "s3cret-token", "api_key": "s3cret-key", "redis_url": "redis://:s3cret@h/0"}
    with TestClient(make_app(**secrets), HERE, headers={"Authorization": "Bearer s3cret-token"}) as client:
        register(client)
        for route in (
            "/global_config_dict_yaml",
            "/server_instances",
            "/v1/servers",
            "/openapi.json",
            "/metrics",
        ):
            answer = client.get(route)
            assert answer.status_code == 200
            assert "s3cret" not in answer.text


def test_a_server_cannot_pose_as_the_head(client: TestClient) -> None:
    register(client, name="head_server", url="http://evil:1")
    config = yaml.safe_load(client.get("/global_config_dict_yaml").json())
    assert set(config["head_server"]) == {"host", "port"}


def test_settings_of_a_fleet_are_told(make_app: Callable[..., FastAPI]) -> None:
    settings = Settings(worker_heartbeat_interval=5, worker_timeout=20)
    app = make_app(worker_heartbeat_interval=5, worker_timeout=20)
    with TestClient(app, HERE) as client:
        answer = client.post("/v1/servers", json=SERVER).json()
    assert (answer["heartbeat_interval"], answer["timeout"]) == (
        settings.worker_heartbeat_interval,
        settings.worker_timeout,
    )
