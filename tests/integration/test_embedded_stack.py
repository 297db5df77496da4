"""The embedded stack with a real Redis; Celery is played by small scripts, except where it matters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from redis import Redis

from gym_queue.embedded.redis import RedisServer
from gym_queue.embedded.stack import EmbeddedStack, celery_commands
from gym_queue.errors import StackError, UsageError
from gym_queue.settings import Settings
from gym_queue.testing import async_wait_until, wait_until
from tests.integration.played_processes import Pids, play, running, worker

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def own_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GYM_QUEUE_REDIS_URL", raising=False)


@pytest.fixture
def shared_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "shared") as server:
        monkeypatch.setenv("GYM_QUEUE_REDIS_URL", server.url)
        yield server


@pytest.mark.usefixtures("own_redis")
async def test_up_ready_and_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(
        monkeypatch,
        {"gpu1": worker("gpu1"), "gpu2": worker("gpu2"), "cpu": worker("cpu"), "beat": worker("beat")},
    )
    async with EmbeddedStack(Settings(), tmp_path, workers=2, verifiers=1) as stack:
        pids = Pids(stack.settings.redis_url)
        await stack.wait_ready(pids.ready)
        processes = pids.read()
        assert {"gpu1", "gpu2", "cpu"} <= set(processes)
        redis = stack.parts["redis"].process
        assert redis is not None
        everyone = [*processes.values(), redis.pid]
        assert all(os.getsid(pid) == pid for pid in everyone), "the terminal's Ctrl-C must reach none of them"
        pids.client.close()
    assert not any(running(pid) for pid in everyone)
    assert "gpu1 is up" in (tmp_path / "logs" / "gpu1.log").read_text()
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {
        "gpu1.log", "gpu2.log", "cpu.log", "beat.log", "redis.log",
    }  # fmt: skip


@pytest.mark.usefixtures("own_redis")
async def test_a_worker_that_never_gets_ready_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, {"gpu1": worker("someone")})

    async def someone_else() -> set[int]:
        return {os.getpid()}

    async with EmbeddedStack(Settings(), tmp_path, workers=1, verifiers=0) as stack:
        await async_wait_until(
            lambda: "up" in stack.parts["gpu1"].log.read_text(), what="the worker's last words"
        )
        with pytest.raises(
            StackError, match=r"worker gpu1 was not ready in 0 s; its last words: someone is up"
        ):
            await stack.wait_ready(someone_else, timeout=0.0)


@pytest.mark.usefixtures("own_redis")
async def test_what_ignores_term_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubborn = textwrap.dedent(
        """
        import os, signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = os.fork()
        print(child or os.getpid(), "stays", flush=True)
        while True:
            signal.pause()
        """
    )
    play(monkeypatch, {"gpu1": worker("gpu1", stubborn)})
    stack = EmbeddedStack(Settings(), tmp_path, workers=1, verifiers=0)
    async with stack:
        log = stack.parts["gpu1"].log
        await async_wait_until(lambda: log.read_text().count("stays") == 2, what="the child")
        process = stack.parts["gpu1"].process
        assert process is not None
        child = int(log.read_text().split()[0])
        await stack.stop(grace=0.0)
        assert process.returncode == -signal.SIGKILL
        await async_wait_until(lambda: not running(child), what="the child's end")


@pytest.mark.usefixtures("own_redis")
async def test_services_end_before_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = textwrap.dedent(
        """
        import os, pathlib, signal, sys
        from redis import Redis
        def end(*_):
            with Redis.from_url(os.environ["GYM_QUEUE_REDIS_URL"]) as client:
                os.kill(int(client.hget("pids", "gpu1")), 0)
            print("the worker is there", flush=True)
            sys.exit(0)
        signal.signal(signal.SIGTERM, end)
        print("serving", flush=True)
        while True:
            signal.pause()
        """
    )
    play(monkeypatch, {"gpu1": worker("gpu1")})
    services = {"head": worker("head", service)}
    async with EmbeddedStack(Settings(), tmp_path, workers=1, verifiers=0, services=services) as stack:
        pids, log = Pids(stack.settings.redis_url), tmp_path / "logs" / "head.log"
        await stack.wait_ready(pids.ready)
        await async_wait_until(lambda: "serving" in log.read_text(), what="the service")
        pids.client.close()
    assert "the worker is there" in log.read_text()


async def test_a_redis_of_the_users_is_used_and_left_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_redis: RedisServer
) -> None:
    play(monkeypatch, {"gpu1": worker("gpu1")})
    async with EmbeddedStack(Settings(), tmp_path, workers=1, verifiers=0) as stack:
        assert "redis" not in stack.parts
        pids = Pids(shared_redis.url)
        await stack.wait_ready(pids.ready)
        assert stack.settings.redis_url == shared_redis.url
    assert pids.client.ping()
    pids.client.close()


async def test_a_password_is_asked_for_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_redis: RedisServer
) -> None:
    play(monkeypatch, {})
    with Redis.from_url(shared_redis.url) as client:
        client.config_set("requirepass", "open sesame")
        with pytest.raises(StackError, match=r"needs a password: set GYM_QUEUE_REDIS_URL"):
            await EmbeddedStack(Settings(), tmp_path, workers=0, verifiers=0).__aenter__()
        monkeypatch.setenv("GYM_QUEUE_REDIS_URL", f"{shared_redis.url}&password=guess")
        with pytest.raises(StackError, match=r"password=\*\*\* refuses this user or password") as refused:
            await EmbeddedStack(Settings(), tmp_path, workers=0, verifiers=0).__aenter__()
        assert "guess" not in str(refused.value)
        monkeypatch.setenv("GYM_QUEUE_REDIS_URL", f"{shared_redis.url}&password=open sesame")
        async with EmbeddedStack(Settings(), tmp_path, workers=0, verifiers=0) as stack:
            assert "open sesame" in stack.settings.redis_url


def test_no_secret_is_a_process_argument() -> None:
    commands = celery_commands(2, 3, "-77")
    assert list(commands) == ["gpu1", "gpu2", "cpu", "beat"]
    assert commands["gpu2"][1:] == [
        "-m",
        "celery",
        "--quiet",
        "-A",
        "workers.gpu",
        "worker",
        "-n",
        "gpu2-77@%h",
    ]
    assert commands["cpu"][-4:] == ["-n", "cpu-77@%h", "--concurrency", "3"]
    assert commands["beat"][1:] == ["-m", "celery", "--quiet", "-A", "beat", "beat"]
    assert list(celery_commands(1, 0)) == ["gpu1", "beat"]
    assert list(celery_commands(0, 1)) == ["cpu", "beat"]
    assert celery_commands(0, 0) == {}, "nor beat: a fleet has its own"


PARENT = textwrap.dedent(
    """
    import asyncio, os, sys
    from pathlib import Path
    from gym_queue.embedded.stack import EmbeddedStack
    from gym_queue.settings import Settings
    from redis import Redis

    async def main():
        async with EmbeddedStack(Settings(), Path(sys.argv[1]), workers=1, verifiers=2) as stack:
            async def ready():
                with Redis.from_url(stack.settings.redis_url) as client:
                    return {int(pid) for pid in client.hvals("pids")}
            await stack.wait_ready(ready)
            with Redis.from_url(stack.settings.redis_url) as client:
                children = [pid.decode() for pid in client.hvals("pids") + client.lrange("prefork", 0, -1)]
            print(*[part.process.pid for part in stack.parts.values()], *children, flush=True)
            await asyncio.sleep(600)

    asyncio.run(main())
    """
)

# Real Celery workers without tasks: what is tested is that processes as Celery forks them are gone.
CELERY_APP = textwrap.dedent(
    """
    import os
    from celery import Celery
    from celery.signals import worker_process_init, worker_ready
    from redis import Redis

    url = os.environ["GYM_QUEUE_REDIS_URL"]
    app = Celery("fake", broker=url.replace("unix://", "redis+socket://").replace("?db=0", "?virtual_host=0"))
    app.conf.worker_pool = POOL

    @worker_process_init.connect
    def forked(**_):
        with Redis.from_url(url) as client:
            client.rpush("prefork", os.getpid())

    @worker_ready.connect
    def ready(sender, **_):
        with Redis.from_url(url) as client:
            client.hset("pids", sender.hostname, os.getpid())
    """
)


@pytest.mark.usefixtures("own_redis")
def test_real_celery_processes_die_with_their_parent(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    for package in ("workers", "beat"):
        (tmp_path / package).mkdir()
    (tmp_path / "workers" / "__init__.py").touch()
    (tmp_path / "workers" / "gpu.py").write_text(CELERY_APP.replace("POOL", "'solo'"))
    (tmp_path / "workers" / "cpu.py").write_text(CELERY_APP.replace("POOL", "'prefork'"))
    (tmp_path / "beat" / "__init__.py").write_text(CELERY_APP.replace("POOL", "'solo'"))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        assert parent.stdout is not None
        everyone = [int(pid) for pid in parent.stdout.readline().split()]
        logs = {path.name: path.read_text() for path in (tmp_path / "run" / "logs").iterdir()}
        assert len(everyone) >= 4 + 2 + 2, logs
        assert all(running(pid) for pid in everyone)
        parent.send_signal(signal.SIGKILL)
        wait_until(lambda: not any(running(pid) for pid in everyone), what="all to follow their parent")
    finally:
        parent.kill()
        parent.communicate()


# --- what is too large for Redis ---------------------------------------------------------------------------


@pytest.mark.usefixtures("own_redis")
@pytest.mark.parametrize("fresh", [True, False])
async def test_g5_what_is_too_large_for_our_own_redis_lies_beside_it(tmp_path: Path, *, fresh: bool) -> None:
    left = tmp_path / "payloads" / "run-earlier"
    left.mkdir(parents=True)
    async with EmbeddedStack(Settings(), tmp_path, workers=0, verifiers=0, fresh=fresh) as stack:
        assert stack.settings.payload_url == str(tmp_path / "payloads")
        assert left.exists() is not fresh


@pytest.mark.usefixtures("shared_redis")
async def test_who_else_uses_a_redis_may_not_see_our_folder(tmp_path: Path) -> None:
    async with EmbeddedStack(Settings(), tmp_path, workers=0, verifiers=0) as stack:
        assert stack.settings.payload_url == ""


@pytest.mark.usefixtures("own_redis")
async def test_where_the_user_said_is_checked_before_anything_is_started(tmp_path: Path) -> None:
    for url in ("", str(tmp_path / "elsewhere")):
        stack = EmbeddedStack(Settings(payload_url=url), tmp_path, workers=0, verifiers=0)
        async with stack:
            assert stack.settings.payload_url == url
    (tmp_path / "file").touch()
    stack = EmbeddedStack(Settings(payload_url=str(tmp_path / "file")), tmp_path, workers=1, verifiers=0)
    with pytest.raises(UsageError, match="GYM_QUEUE_PAYLOAD_URL cannot be used"):
        await stack.__aenter__()
    assert stack.parts == {}
