"""The head as a server: it stops gently, and has no patience for connections that say nothing."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.errors import UsageError
from gym_queue.head.server import Protocol, address_of, listen, make_server
from gym_queue.testing import async_wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ASKED = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def serving() -> AsyncIterator[int]:
    """Serve ``app``; gives the port."""
    with listen("127.0.0.1", 0) as listener:
        server = make_server(app, lambda: None)
        task = asyncio.create_task(server.serve([listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await task


@asynccontextmanager
async def connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Protocol, "headers_timeout", 0.1)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("begun", [b"", b"G", ASKED[:-2]])
async def test_a_request_that_never_comes_whole_is_not_waited_for(begun: bytes) -> None:
    async with serving() as port, connection(port) as (reader, writer):
        writer.write(begun)
        answer = await asyncio.wait_for(reader.read(), 10.0)
    assert answer == b""


@pytest.mark.usefixtures("hasty")
async def test_one_that_comes_byte_by_byte_neither() -> None:
    async with serving() as port, connection(port) as (reader, writer):
        gone = asyncio.create_task(reader.read())
        for byte in b"GET / HTTP/1.1\r\nX: " + b"x" * 10_000:
            writer.write(bytes([byte]))
            await asyncio.wait({gone}, timeout=0.01)
            if gone.done():
                break
        assert gone.done()
        with suppress(ConnectionResetError):  # of bytes that came too late
            assert gone.result() == b""


async def test_one_that_is_whole_is_answered_after_another() -> None:
    async with serving() as port, connection(port) as (reader, writer):
        for _ in range(3):
            writer.write(ASKED)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10.0)
            assert head.startswith(b"HTTP/1.1 200 OK")
            assert b"server" not in head.lower()
            assert await reader.readexactly(2) == b"ok"


@pytest.mark.parametrize(
    "noise",
    [b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET\r\n\r\n", b"\x00" * 100_000,
     b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
     b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\nz\r\n"],
)  # fmt: skip
async def test_what_is_no_http_is_told_so_in_json(noise: bytes) -> None:
    async with serving() as port, connection(port) as (reader, writer):
        writer.write(noise)
        answer = await asyncio.wait_for(reader.read(), 10.0)
    head, _, body = answer.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 200"):  # of two lengths, the chunks count
        return
    assert head.startswith(b"HTTP/1.1 400 Bad Request")
    assert json.loads(body)["error"]["type"] == "bad_request"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_it_and_is_not_raised_again(number: signal.Signals) -> None:
    told: list[str] = []
    before = signal.getsignal(number)
    with listen("127.0.0.1", 0) as listener:
        server = make_server(app, lambda: told.append("stop"))
        task = asyncio.create_task(server.serve([listener]))
        await async_wait_until(lambda: server.started)
        signal.raise_signal(number)
        await asyncio.wait_for(task, 10.0)
    assert told == ["stop"]
    assert signal.getsignal(number) is before


def test_a_port_that_is_taken() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert address_of(listener) == f"http://127.0.0.1:{port}"
        with pytest.raises(UsageError, match=rf"port {port}: Address already in use"):
            listen("127.0.0.1", port)


async def test_answers_go_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    options = []
    made = Protocol.connection_made

    def connection_made(self: Protocol, transport: asyncio.Transport) -> None:
        connected = transport.get_extra_info("socket")
        options.append(connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        made(self, transport)

    monkeypatch.setattr(Protocol, "connection_made", connection_made)
    async with serving() as port, connection(port) as (reader, writer):
        writer.write(ASKED)
        await asyncio.wait_for(reader.readexactly(1), 10.0)
    assert options == [1], "Nagle's algorithm would hold back the second piece of each answer"


def test_an_address_that_is_none() -> None:
    with pytest.raises(UsageError, match=r"cannot listen on no\.such\.host\.invalid, port 0"):
        listen("no.such.host.invalid", 0)


def test_the_sixth_version() -> None:
    try:
        listener = listen("::1", 0)
    except UsageError:
        pytest.skip("this machine has no IPv6")
    with listener:
        assert address_of(listener).startswith("http://[::1]:")
