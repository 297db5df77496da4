"""What dies in the embedded stack starts again; the stack gives up on what dies in vain. Real Redis."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import textwrap
from typing import TYPE_CHECKING

import pytest

from gym_queue.embedded import stack as stack_module
from gym_queue.embedded.stack import Death, EmbeddedStack
from gym_queue.errors import StackError
from gym_queue.settings import Settings
from gym_queue.testing import async_wait_until
from tests.integration.played_processes import Pids, play, worker

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("own_redis")


@pytest.fixture
def own_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GYM_QUEUE_REDIS_URL", raising=False)


async def test_what_dies_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    play(monkeypatch, {"gpu1": worker("gpu1")})
    async with EmbeddedStack(Settings(), tmp_path, workers=1, verifiers=0) as stack:
        dead: list[Death] = []
        supervision = asyncio.create_task(stack.supervise(dead.append))
        pids = Pids(stack.settings.redis_url)
        await stack.wait_ready(pids.ready)
        first = pids.read()["gpu1"]
        redis = stack.parts["redis"].process
        assert redis is not None
        with caplog.at_level(logging.WARNING):
            os.kill(first, signal.SIGKILL)
            await async_wait_until(lambda: pids.read()["gpu1"] != first, what="a new worker")
            redis.kill()
            await async_wait_until(lambda: stack.parts["redis"].process is not redis, what="a new Redis")
            await asyncio.to_thread(stack._redis.wait_ready)  # type: ignore[union-attr]
        assert [death.pid for death in dead] == [first, redis.pid]
        assert dead[0].words == (
            f"was killed by SIGKILL; its last words ({stack.parts['gpu1'].log}): gpu1 is up"
        )
        assert "gpu1 was killed by SIGKILL; it starts again in 0.5 s" in caplog.text
        assert pids.read()["gpu1"] != first, "Redis has its records back"
        pids.client.close()
        supervision.cancel()
        await asyncio.gather(supervision, return_exceptions=True)


async def test_a_worker_that_cannot_start_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = worker("gpu1", "import sys; sys.exit('no module named galaxy')")
    play(monkeypatch, {"gpu1": broken})
    async with EmbeddedStack(Settings(), tmp_path, workers=1, verifiers=0) as stack:
        with pytest.raises(StackError) as refused:
            await asyncio.wait_for(stack.supervise(), 30)
    assert "gpu1 ended with status 1, 3 times in a row" in str(refused.value)
    assert "no module named galaxy" in str(refused.value)
    assert "\n" not in str(refused.value)


# A worker that says that it is there, and dies as soon as it is given the word.
MORTAL = textwrap.dedent(
    """
    import os, sys
    from redis import Redis
    with Redis.from_url(os.environ["GYM_QUEUE_REDIS_URL"]) as client:
        client.hset("pids", sys.argv[1], os.getpid())
        client.blpop("death")
    sys.exit("a broken library")
    """
)


class Mortals:
    """A stack whose only worker dies whenever ``die`` says so, and a run whose progress is a number."""

    def __init__(self, stack: EmbeddedStack) -> None:
        self.stack = stack
        self.progress = 0
        self.deaths: list[Death] = []
        self.pids = Pids(stack.settings.redis_url)

    async def die(self, supervision: asyncio.Task[None]) -> None:
        """Let the worker die once more, and wait until the next one is there or the stack gives up."""
        before = len(self.deaths)
        known = self.pids.read().get("gpu1")
        self.pids.client.rpush("death", "now")
        await async_wait_until(
            lambda: supervision.done() or (len(self.deaths) > before and self.pids.read()["gpu1"] != known),
            what="the next worker",
        )

    def on_death(self, death: Death) -> None:
        self.deaths.append(death)
        self.stack.could_start(death.pid)


@pytest.mark.parametrize("step", [1, 0])
async def test_a_worker_may_die_often_as_long_as_rollouts_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Poison rollouts kill it again and again; a broken library does too, but nothing ever ends."""
    monkeypatch.setattr(stack_module, "_CHANCES", 6)
    monkeypatch.setattr(stack_module, "_FIRST_BACKOFF", 0.05)
    play(monkeypatch, {"gpu1": worker("gpu1", MORTAL)})
    async with EmbeddedStack(Settings(), tmp_path, workers=1, verifiers=0) as stack:
        mortals = Mortals(stack)
        await stack.wait_ready(mortals.pids.ready)
        supervision = asyncio.create_task(stack.supervise(mortals.on_death, lambda: mortals.progress))
        for number in range(12):
            await mortals.die(supervision)
            mortals.progress += step * (number % 3 == 0)
        mortals.pids.client.close()
        if not step:
            with pytest.raises(StackError, match=r"6 times in a row with no progress .* a broken library"):
                await supervision
            return
        assert not supervision.done()
        assert len(mortals.deaths) == 12
        assert stack._records["gpu1"].early == 0, "it starts again at once"
        supervision.cancel()
        await asyncio.gather(supervision, return_exceptions=True)


async def test_a_worker_that_cannot_start_any_more_waits_longer_each_time_and_takes_no_others_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One of several GPUs broke: the others go on, and while they do the stack does not give up."""
    monkeypatch.setattr(stack_module, "_CHANCES_TO_START", 3)
    monkeypatch.setattr(stack_module, "_FIRST_BACKOFF", 0.05)
    broken = "import os, pathlib, sys\nif pathlib.Path('broken').exists(): sys.exit('no GPU')\n"
    monkeypatch.chdir(tmp_path)
    play(monkeypatch, {"gpu1": worker("gpu1", broken + MORTAL), "gpu2": worker("gpu2")})
    async with EmbeddedStack(Settings(), tmp_path, workers=2, verifiers=0) as stack:
        pids = Pids(stack.settings.redis_url)
        await stack.wait_ready(pids.ready)
        (tmp_path / "broken").touch()
        steps = iter(range(1000))
        deaths: list[Death] = []
        busy = asyncio.create_task(stack.supervise(deaths.append, lambda: next(steps)))
        pids.client.rpush("death", "now")
        await async_wait_until(lambda: len(deaths) >= 6, what="starts that fail")
        assert not busy.done()
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)
        delays = [float(delay) for delay in re.findall(r"starts again in ([\d.]+) s", caplog.text)]
        assert delays[:5] == [0.05, 0.1, 0.2, 0.4, 0.8]
        idle = asyncio.create_task(stack.supervise())
        with pytest.raises(StackError, match=r"gpu1 ended with status 1, \d times in a row .*no GPU"):
            await asyncio.wait_for(idle, 30)
        pids.client.close()


async def test_the_last_words_of_a_crash_say_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = textwrap.dedent(
        """
        import ctypes, pathlib, sys
        def tool():
            ctypes.string_at(0)
        if pathlib.Path("crashed").exists():
            sys.exit("the second life")
        pathlib.Path("crashed").touch()
        tool()
        """
    )
    monkeypatch.chdir(tmp_path)
    play(monkeypatch, {"gpu1": worker("gpu1", crash)})
    async with EmbeddedStack(Settings(), tmp_path, workers=1, verifiers=0) as stack:
        deaths: list[Death] = []
        supervision = asyncio.create_task(stack.supervise(deaths.append))
        await async_wait_until(lambda: len(deaths) == 2, what="the crash, and another death")
        supervision.cancel()
        await asyncio.gather(supervision, return_exceptions=True)
    assert deaths[0].words.startswith("was killed by SIGSEGV; its last words (")
    assert "gpu1.log): Fatal Python error: Segmentation fault | " in deaths[0].words
    assert " in tool" in deaths[0].words
    assert deaths[1].words.endswith("gpu1.log): the second life"), "the crash was that of another process"
