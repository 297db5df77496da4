"""Redis servers that cannot carry the ledger."""

from __future__ import annotations

import asyncio
import socketserver
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from gym_queue.embedded import preflight
from gym_queue.embedded.preflight import await_redis, check_redis
from gym_queue.embedded.redis import RedisServer
from gym_queue.errors import RedisAwayError, StackError
from gym_queue.testing import async_wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def test_an_unusable_url_is_one_sentence() -> None:
    with pytest.raises(StackError, match=r"^the Redis URL http://:\*\*\*@host cannot be used: .*redis://"):
        check_redis("http://:secret@host")


def test_an_unreachable_redis_is_one_sentence() -> None:
    with pytest.raises(StackError, match=r"^the Redis at unix:///nowhere/redis\.sock does not answer: "):
        check_redis("unix:///nowhere/redis.sock")


@pytest.mark.parametrize("version", ["5.0.14", "6.0.16"])
def test_an_old_redis_is_refused(version: str) -> None:
    with pytest.raises(
        StackError, match=rf"^the Redis at redis://x is {version}, but 6\.2 or newer is needed$"
    ):
        preflight._refuse_unfit("redis://x", {"redis_version": version})


def test_a_redis_that_forgets_is_refused() -> None:
    fit = {"redis_version": "7.0.0", "maxmemory_policy": "noeviction"}
    preflight._refuse_unfit("redis://x", fit)
    with pytest.raises(StackError, match="must be noeviction"):
        preflight._refuse_unfit("redis://x", {**fit, "maxmemory_policy": "allkeys-lru"})


class Server(socketserver.ThreadingTCPServer):
    """Says these things, one a connection and then the last for ever, to whoever asks; hangs up after each
    that is empty.
    """

    daemon_threads = True

    def __init__(self, *answers: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = list(answers)
        self.asked = 0
        self.url = f"redis://127.0.0.1:{self.server_address[1]}/0"


class Handler(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        answer = self.server.answers[min(self.server.asked, len(self.server.answers) - 1)]
        self.server.asked += 1
        while answer and (head := self.rfile.readline()):
            words = []
            for _ in range(int(head[1:])):
                length = int(self.rfile.readline()[1:])
                words.append(self.rfile.read(length + 2)[:-2].upper())
            self.wfile.write(answer if words[0] == b"INFO" else b"+OK\r\n")


def said(info: str) -> bytes:
    return f"${len(info)}\r\n{info}\r\n".encode()


@contextmanager
def serving(*answers: bytes) -> Iterator[Server]:
    with Server(*answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


GOOD = said("redis_version:7.0.0\r\n")
HANGS_UP = b""
LOADING = b"-LOADING Redis is loading the dataset in memory\r\n"
DEMOTED = b"-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.\r\n"


@pytest.mark.parametrize("trouble", [HANGS_UP, LOADING, DEMOTED])
async def test_a_redis_that_is_in_trouble_for_a_moment_is_waited_for(
    trouble: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(trouble, trouble, GOOD) as server:
        await await_redis(server.url)
        assert server.asked == 3
    assert caplog.text.count("does not answer: ") == 1
    assert caplog.text.count("waiting up to 10 s") == 1


async def test_a_redis_that_starts_meanwhile_is_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = RedisServer(tmp_path)
    waiting = asyncio.create_task(await_redis(server.url))
    await async_wait_until(lambda: "waiting" in caplog.text, what="it to wait")
    with server:
        await waiting


async def test_the_wait_for_a_redis_has_an_end() -> None:
    with serving(HANGS_UP) as server:
        with pytest.raises(RedisAwayError, match="does not answer"):
            await await_redis(server.url, 0.3)
        assert server.asked > 2


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"-NOAUTH Authentication required.\r\n", "needs a password"),
        (b"-NOPERM this user has no permissions\r\n", "does not let this user run INFO"),
        (b"-ERR unknown command\r\n", "does not answer: unknown command"),
        (said("redis_version:5.0.14\r\n"), "is 5.0.14"),
        (said("redis_version:7.0.0\r\nmaxmemory_policy:allkeys-lru\r\n"), "must be noeviction"),
    ],
)
async def test_what_no_time_can_heal_is_said_at_once(
    answer: bytes, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(answer) as server:
        with pytest.raises(StackError, match=sentence):
            await await_redis(server.url)
        assert server.asked == 1
    assert caplog.text == ""


async def test_a_command_that_looks_something_up_does_not_wait() -> None:
    with serving(HANGS_UP, GOOD) as server:
        with pytest.raises(RedisAwayError):
            check_redis(server.url)
        assert server.asked == 1
