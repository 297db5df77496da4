"""``ServerClient`` and ``registered``: servers that are reached by name, among those that are healthy."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from gym_queue import AsyncClient
from gym_queue.client.servers import ServerClient, registered
from gym_queue.errors import ServerAwayError, ServerBrokeOffError, UnauthorizedError
from gym_queue.testing import async_wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.unit.client.fake_head import FakeHead


class Instance:
    """One instance of a server: counts what it does, waits and breaks off as told."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.breaks = 0
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/act", self._act)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _act(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else None
        self.done.append({"body": body, "cookies": dict(request.cookies)})
        await self.gate.wait()
        if self.breaks:
            self.breaks -= 1
            assert request.transport is not None
            request.transport.abort()
        answer = web.json_response({"port": self.port, "body": body})
        if "session" not in request.cookies:
            answer.set_cookie("session", f"{self.port}-{len(self.done)}")
        return answer


@pytest.fixture
async def instances(client: AsyncClient) -> AsyncIterator[list[Instance]]:
    """Three instances that are registered as ``policy``."""
    made = [Instance() for _ in range(3)]
    async with AsyncExitStack() as stack:
        for instance in made:
            await instance.start()
            stack.push_async_callback(instance.stop)
            known = registered(client, name="policy", kind="responses_api_models", url=instance.url)
            await stack.enter_async_context(known)
        yield made


@pytest.fixture
async def servers(client: AsyncClient) -> AsyncIterator[ServerClient]:
    async with ServerClient(client) as made:
        yield made


async def port_of(answer: Any) -> int:
    return int((await (await answer).json())["port"])


async def test_a_server_is_found_by_its_name(servers: ServerClient, instances: list[Instance]) -> None:
    answer = await servers.post(server_name="policy", url_path="/act", json={"a": 1})
    assert answer.status == 200
    assert (await answer.json())["body"] == {"a": 1}
    answer = await servers.get(server_name="policy", url_path="nowhere")
    assert answer.status == 404, "an answer is an answer, whatever it says"
    assert sum(len(instance.done) for instance in instances) == 1


async def test_the_idlest_instance_is_asked(servers: ServerClient, instances: list[Instance]) -> None:
    for instance in instances:
        instance.gate.clear()
    asked = [
        asyncio.create_task(port_of(servers.post(server_name="policy", url_path="/act"))) for _ in range(9)
    ]
    await async_wait_until(lambda: sum(len(instance.done) for instance in instances) == 9)
    assert [len(instance.done) for instance in instances] == [3, 3, 3]
    instances[0].gate.set()  # its three are answered: it is the idlest now
    await async_wait_until(lambda: sum(task.done() for task in asked) == 3)
    assert await port_of(servers.post(server_name="policy", url_path="/act")) == instances[0].port
    for instance in instances:
        instance.gate.set()
    assert Counter(await asyncio.gather(*asked)) == {instance.port: 3 for instance in instances}


async def test_a_session_stays_with_its_cookies(servers: ServerClient, instances: list[Instance]) -> None:
    ports: dict[str, set[int]] = {}
    for _ in range(5):
        for session in ("a", "b", "c", "d"):
            port = await port_of(
                servers.post(server_name="policy", url_path="/act", json={"s": session}, session=session)
            )
            ports.setdefault(session, set()).add(port)
    assert all(len(where) == 1 for where in ports.values())
    cookies: dict[str, set[str | None]] = {}
    for instance in instances:
        for request in instance.done:
            cookies.setdefault(request["body"]["s"], set()).add(request["cookies"].get("session"))
    assert all(len(seen) == 2 and None in seen for seen in cookies.values()), "none at first, then its own"
    assert len({str(seen - {None}) for seen in cookies.values()}) == 4
    servers.forget("policy", "a")
    await servers.post(server_name="policy", url_path="/act", json={"s": "a"}, session="a")
    assert [r["cookies"] for i in instances for r in i.done].count({}) == 5


async def test_a_session_begins_at_one_instance_even_if_all_at_once(
    servers: ServerClient, instances: list[Instance]
) -> None:
    calls = [port_of(servers.post(server_name="policy", url_path="/act", session="a")) for _ in range(8)]
    assert len(set(await asyncio.gather(*calls))) == 1
    assert len(instances) == 3


async def test_an_instance_that_takes_no_connection_is_passed_over(
    servers: ServerClient, instances: list[Instance]
) -> None:
    assert len(await servers._instances("policy", anew=False)) == 3
    await instances[0].stop()
    await instances[1].stop()
    for _ in range(8):
        assert await port_of(servers.post(server_name="policy", url_path="/act")) == instances[2].port


async def test_an_instance_that_went_takes_its_sessions_along(
    servers: ServerClient, instances: list[Instance]
) -> None:
    port = await port_of(servers.post(server_name="policy", url_path="/act", session="a"))
    await next(instance for instance in instances if instance.port == port).stop()
    with pytest.raises(ServerAwayError, match="the instance of policy that knows this session is gone"):
        await servers.post(server_name="policy", url_path="/act", session="a", idempotent=True)


async def test_a_request_that_may_have_been_done_is_not_repeated(
    servers: ServerClient, instances: list[Instance]
) -> None:
    for instance in instances:
        instance.breaks = 1
    with pytest.raises(ServerBrokeOffError, match="POST /act may have been done or not"):
        await servers.post(server_name="policy", url_path="/act")
    assert sum(len(instance.done) for instance in instances) == 1


@pytest.mark.parametrize(
    "send",
    [
        lambda servers, **more: servers.post(server_name="policy", url_path="/act", idempotent=True, **more),
        lambda servers, **more: servers.get(server_name="policy", url_path="/act", **more),
    ],
    ids=["post", "get"],
)
async def test_one_that_may_be_repeated_is(
    servers: ServerClient, instances: list[Instance], send: Callable[..., Any]
) -> None:
    for instance in instances:
        instance.breaks = 2  # aiohttp itself repeats a GET once
    instances[2].breaks = 0
    assert await port_of(send(servers)) == instances[2].port
    port = await port_of(send(servers, session="a"))
    next(instance for instance in instances if instance.port == port).breaks = 1
    assert await port_of(send(servers, session="a")) == port


async def test_the_head_is_asked_anew_when_all_instances_are_gone(
    client: AsyncClient, head: FakeHead, servers: ServerClient, instances: list[Instance]
) -> None:
    for _ in range(2):
        assert len(await servers._instances("policy", anew=False)) == 3
    assert head.seen.count("GET /v1/servers") == 1, "it remembers"
    for instance in instances:
        await instance.stop()
    with pytest.raises(ServerAwayError, match=r"takes no connection \(Connection refused\)"):
        await servers.post(server_name="policy", url_path="/act")
    new = Instance()
    await new.start()
    async with registered(client, name="policy", kind="responses_api_models", url=new.url):
        assert await port_of(servers.post(server_name="policy", url_path="/act")) == new.port
    await new.stop()


async def test_nobody_of_that_name(servers: ServerClient, head: FakeHead) -> None:
    with pytest.raises(ServerAwayError, match="no healthy server is registered as 'critic'"):
        await servers.post(server_name="critic", url_path="/act")
    head.servers["x"] = {"id": "x", "name": "critic", "url": "http://127.0.0.1:9", "healthy": False}
    with pytest.raises(ServerAwayError, match="no healthy server is registered as 'critic'"):
        await servers.post(server_name="critic", url_path="/act")


async def test_an_instance_that_takes_too_long(client: AsyncClient, instances: list[Instance]) -> None:
    for instance in instances:
        instance.gate.clear()
    async with ServerClient(client, timeout=0.1) as servers:
        with pytest.raises(ServerBrokeOffError, match="may have been done or not"):
            await servers.post(server_name="policy", url_path="/act")
    for instance in instances:
        instance.gate.set()


async def test_a_registration_is_renewed_and_taken_back(client: AsyncClient, head: FakeHead) -> None:
    async with registered(
        client,
        name="judge",
        kind="verifier",
        url="http://127.0.0.1:9",
        node="n1",
        versions={"a": "1"},
        capacity=7,
    ) as identity:
        server = head.servers[identity]
        assert (server["node"], server["versions"], server["capacity"]) == ("n1", {"a": "1"}, 7)
        await async_wait_until(lambda: head.servers[identity]["beats"] >= 2)
        head.servers.clear()  # a Redis that was flushed
        await async_wait_until(lambda: identity in head.servers, what="a new registration")
        await head.stop()
        await head.start()
        head.servers[identity]["beats"] = 0
        await async_wait_until(lambda: head.servers[identity]["beats"] >= 1, what="a beat after a restart")
    assert head.servers == {}


async def test_a_registration_that_is_refused(head: FakeHead) -> None:
    async with AsyncClient(head.url, "wrong") as client:
        with pytest.raises(UnauthorizedError):
            async with registered(client, name="judge", kind="verifier", url="http://127.0.0.1:9"):
                pass


async def test_the_end_of_a_registration_needs_no_head(client: AsyncClient, head: FakeHead) -> None:
    client.connection._patience = 0.1
    async with registered(client, name="judge", kind="verifier", url="http://127.0.0.1:9"):
        await head.stop()
    with socket.create_server(("127.0.0.1", head.port), reuse_port=False):
        pass
