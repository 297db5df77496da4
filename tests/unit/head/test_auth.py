"""Who may: the token on every route but two, and this machine only where there is none."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from fastapi.routing import iter_route_contexts
from starlette.testclient import TestClient

from gym_queue.errors import UsageError
from gym_queue.head.auth import OPEN_ROUTES, check_host
from gym_queue.settings import Settings
from tests.unit.head.played_head import HERE, TOKEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastapi import FastAPI

AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def guarded(make_app: Callable[..., FastAPI]) -> Iterator[TestClient]:
    """A client of a head with a token."""
    with TestClient(make_app(auth_token=TOKEN), HERE) as client:
        yield client


def routes(app: FastAPI) -> set[tuple[str, str]]:
    """Return method and path of every route, the documentation's too."""
    return {
        (method, re.sub(r"\{[^}]+\}", "x", str(context.path)))
        for context in iter_route_contexts(app.routes)
        for method in context.methods or ()
    }


def test_every_route_but_two_asks_for_the_token(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(auth_token=TOKEN)
    found = routes(app)
    assert len(found) > 25
    assert {("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/metrics"), ("POST", "/v1/runs")} <= found
    assert len({path for _, path in found} - OPEN_ROUTES) >= len(app.openapi()["paths"]) - 2
    with TestClient(app, HERE) as client:
        for method, path in found:
            answer = client.request(method, path, content=b"{")
            if path in OPEN_ROUTES:
                assert answer.status_code == 200
                continue
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"].startswith("Bearer")
            if method != "HEAD":
                assert answer.json()["error"]["type"] == "unauthorized"


def test_so_do_routes_that_do_not_exist(guarded: TestClient) -> None:
    for path in ("/", "/v1", "/v2/runs", "/health/", "//health", "/healthy", "/%68ealth/../v1/runs"):
        assert guarded.get(path).status_code == 401, path
        assert guarded.put(path).status_code == 401, path


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x",
     f"Bearer {TOKEN[:-1]}", "Bearer \xe9"],
)  # fmt: skip
def test_a_wrong_token(guarded: TestClient, header: str) -> None:
    answer = guarded.get("/v1/runs", headers={b"Authorization": header.encode("latin-1")})
    assert answer.status_code == 401
    assert TOKEN not in answer.text


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_right_token(guarded: TestClient, scheme: str) -> None:
    assert guarded.get("/v1/runs", headers={"Authorization": f"{scheme} {TOKEN}"}).status_code == 200


def test_a_token_in_the_address_is_none(guarded: TestClient) -> None:
    assert guarded.get(f"/v1/runs?token={TOKEN}&access_token={TOKEN}").status_code == 401


def test_the_document_says_that_a_token_is_asked_for(guarded: TestClient) -> None:
    document = guarded.get("/openapi.json", headers=AUTHORIZED).json()
    assert document["security"] == [{"token": []}]
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    assert document["paths"]["/health"]["get"]["security"] == []
    assert TOKEN not in str(document)


def test_the_token_is_not_shown() -> None:
    settings = Settings(auth_token=TOKEN, redis_url="redis://:hush@h/0")
    assert TOKEN not in repr(settings)
    assert "hush" not in repr(settings)


# --- without a token --------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "head.example.org", "127.0.0.1.nip.io"])  # noqa: S104
def test_without_a_token_other_addresses_are_refused(host: str) -> None:
    with pytest.raises(UsageError, match=r"this machine only.*run code.*set GYM_QUEUE_AUTH_TOKEN"):
        check_host(host, "")
    check_host(host, TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost", "LOCALHOST"])
def test_without_a_token_this_machine_is_served(host: str) -> None:
    check_host(host, "")


@pytest.mark.parametrize("host", ["evil.example.org", "10.0.0.1:11000", "[::2]:1", "[", ""])
def test_without_a_token_the_head_is_not_found_under_a_strangers_name(client: TestClient, host: str) -> None:
    answer = client.get("/v1/runs", headers={"Host": host})
    assert answer.status_code == 403
    assert "localhost only" in answer.json()["error"]["message"]


@pytest.mark.parametrize("origin", ["https://evil.example.org", "null", "http://127.0.0.1.evil.org"])
def test_without_a_token_no_web_page_asks(client: TestClient, origin: str) -> None:
    assert client.post("/v1/runs/x/cancel", headers={"Origin": origin}).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:11000", "localhost", "[::1]:80"])
def test_without_a_token_this_machine_asks(client: TestClient, host: str) -> None:
    assert client.get("/v1/runs", headers={"Host": host, "Origin": f"http://{host}"}).status_code == 200
