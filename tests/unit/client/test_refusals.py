"""What ``AsyncClient`` says where it cannot do what it was asked: one sentence each, and its own error."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue import AsyncClient
from gym_queue.client import batches
from gym_queue.errors import (
    HeadAwayError,
    HeadFailedError,
    NotFoundError,
    RequestRefusedError,
    UnauthorizedError,
    UsageError,
)
from gym_queue.testing import async_wait_until
from tests.unit.client.fake_head import TOKEN, questions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.unit.client.fake_head import FakeHead


async def test_examples_that_cannot_be_used_end_the_reading(client: AsyncClient, head: FakeHead) -> None:
    rows = [*questions(batches.MOST_ROWS + 2), {"answer": "no question"}]
    run = await client.submit(model="stub:", examples=rows)
    sentence = "of examples 500 to 502 none was taken: line 3: the row has neither prompt nor messages"
    with pytest.raises(RequestRefusedError, match=sentence):
        [group async for group in run.groups()]
    with pytest.raises(RequestRefusedError, match=sentence):
        await client.flush()
    assert not head.runs[run.run_id].closed
    client._submitted.clear()


def raising() -> Iterator[dict[str, Any]]:
    yield {"prompt": "?"}
    raise ZeroDivisionError("not a number")


@pytest.mark.parametrize(
    ("examples", "kind", "sentence"),
    [
        (["text"], UsageError, "example 0 must be a JSON object, not str"),
        ([{"prompt": "?"}, {"prompt": {1}}], UsageError, "example 1 cannot be written as JSON"),
        ([{"prompt": float("nan")}], UsageError, "example 0 cannot be written as JSON"),
        ([{"prompt": "\ud800"}], UsageError, "example 0 cannot be written as JSON"),
        ("nowhere.jsonl", UsageError, "cannot read nowhere.jsonl: No such file"),
        (raising(), ZeroDivisionError, "not a number"),
    ],
)
async def test_examples_that_cannot_be_sent(
    client: AsyncClient, examples: Any, kind: type[Exception], sentence: str
) -> None:
    run = await client.submit(model="stub:", examples=examples)
    with pytest.raises(kind, match=sentence):
        [group async for group in run.groups()]
    client._submitted.clear()


async def test_refusals_are_typed(client: AsyncClient, head: FakeHead) -> None:
    with pytest.raises(NotFoundError, match=r"^there is no run 'x/y'$"):
        await client.run("x/y")
    with pytest.raises(UsageError, match="the run cannot be submitted: samples: Input should be greater"):
        await client.submit(model="stub:", samples=0)
    with pytest.raises(UsageError, match="the run cannot be submitted: sample: Extra inputs"):
        await client.submit(model="stub:", sample=1)  # type: ignore[call-arg]
    for token, sentence in (("wrong", "does not take this token"), ("", "asks for a token")):
        async with AsyncClient(head.url, token) as stranger:
            with pytest.raises(UnauthorizedError, match=f"{sentence}; is GYM_QUEUE_AUTH_TOKEN right"):
                await stranger.runs()
    head.statuses = [413]
    with pytest.raises(RequestRefusedError, match="told to say 413"):
        await client.runs()
    head.statuses = [301]
    with pytest.raises(HeadFailedError, match="answered 301"):
        await client.runs()


async def test_a_head_that_fails_is_not_asked_for_ever(head: FakeHead) -> None:
    async with AsyncClient(head.url, TOKEN, patience=0.3) as client:
        run = await client.submit(model="stub:")
        head.statuses = [500] * 100
        with pytest.raises(HeadFailedError, match="answered 500: told to say 500"):
            await run.status()
        with pytest.raises(HeadFailedError, match="answered 500"):
            [group async for group in run.groups()]
        assert len(head.statuses) > 80
        head.statuses = []


async def test_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    async with AsyncClient(f"http://127.0.0.1:{port}", patience=0.3) as client:
        for call in (client.runs(), client.submit(model="stub:")):
            with pytest.raises(HeadAwayError, match=rf":{port} cannot be reached \(Connection refused\)$"):
                await call
    assert caplog.text.count("trying again") == 1


async def test_a_head_that_takes_connections_and_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        async with AsyncClient(f"http://127.0.0.1:{server.getsockname()[1]}", patience=0.2) as client:
            with pytest.raises(HeadAwayError, match="nothing came for 1 s"):
                await client.runs()


async def test_what_is_no_head(head: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    async def page(*_: Any) -> Any:
        from aiohttp import web  # noqa: PLC0415

        return web.Response(text="<html>hello</html>", content_type="text/html")

    monkeypatch.setattr(head, "_list", page)
    await head.stop()
    await head.start()
    async with AsyncClient(head.url, TOKEN) as client:
        with pytest.raises(HeadFailedError, match="something that is not JSON; is it a head"):
            await client.runs()
        run = await client.submit(model="stub:", examples=questions(1))
        await run.flush()
        head.runs[run.run_id].groups[0] = b'{"group": {}, "cursor": 1}'
        with pytest.raises(HeadFailedError, match="a feed that is no head's"):
            [group async for group in run.groups()]
        head.runs[run.run_id].groups[0] = b'{"cursor": 1, "group": {"run_id": 5}}'
        with pytest.raises(HeadFailedError, match=r"a group that cannot be read \(run_id: Input should be"):
            [group async for group in run.groups()]


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("", "no head is named"),
        ("head:11000", "is no address of a head"),
        ("ftp://head", "is no address of a head"),
        ("http://head:99999999", "is no address of a head"),
        ("http://head/?a=b", "is no address of a head"),
        ("http://me:secret@head", "must not carry a password"),
    ],
)
def test_wrong_addresses(url: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEAD_SERVER_URL", raising=False)
    with pytest.raises(UsageError, match=sentence) as caught:
        AsyncClient(url)
    assert "secret" not in str(caught.value)


async def test_the_head_and_the_token_are_settings(head: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEAD_SERVER_URL", head.url + "/")
    monkeypatch.setenv("GYM_QUEUE_AUTH_TOKEN", TOKEN)
    async with AsyncClient() as client:
        assert await client.runs() == []
    monkeypatch.setenv("HEAD_SERVER_URL", "")
    with pytest.raises(UsageError, match="no head is named"):
        AsyncClient()


def test_a_setting_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GYM_QUEUE_WINDOW", "many")
    with pytest.raises(UsageError, match="the setting window cannot be used: Input should be"):
        AsyncClient("http://head:11000")


async def test_patience_begins_anew_with_each_sign_of_life(head: FakeHead) -> None:
    async with AsyncClient(head.url, TOKEN, patience=0.3) as client:
        head.held = True
        run = await client.submit(model="stub:", examples=questions(1))
        await run.flush()
        waiting = asyncio.ensure_future(anext(run.groups()))
        await asyncio.wait([waiting], timeout=0.6)  # signs of life come all the while
        head.statuses = [500]
        await head.stop()
        await head.start()
        await async_wait_until(lambda: not head.statuses, what="the failure")
        head.release()
        assert (await waiting).example_index == 0
