"""``Client``: the same without an event loop, from threads, forks and processes that just end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gym_queue import Client
from gym_queue.client.asynchronous import AsyncClient
from gym_queue.client.background import BackgroundLoop
from gym_queue.client.run import AsyncRun
from gym_queue.client.synchronous import Run
from gym_queue.errors import ConflictError, HeadAwayError, UsageError
from gym_queue.records import RunState
from gym_queue.testing import wait_until
from tests.unit.client.fake_head import TOKEN

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from tests.unit.client.fake_head import FakeHead

ROOT = Path(__file__).parents[3]
ROWS = [{"prompt": f"{number} + 1?"} for number in range(5)]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gym_queue client"]


def test_a_run_from_examples_to_groups(sync_client: Client) -> None:
    run = sync_client.submit(model="stub:", samples=2, examples=ROWS)
    assert repr(run) == f"<Run {run.run_id} at {sync_client._client.connection.base}>"
    assert [group.example_index for group in run.groups()] == [0, 1, 2, 3, 4]
    assert len(list(run.rollouts())) == 10
    assert run.status().state is RunState.ENDED
    assert run.metrics() == {"rollouts": {"ended": 10}}
    again = sync_client.run(run.run_id)
    assert [group.example_index for group in again.groups("3")] == [3, 4]
    assert [view.run_id for view in sync_client.runs()] == [run.run_id]


def test_every_call(sync_client: Client) -> None:
    run = sync_client.submit(model="stub:", idempotency_key="one")
    assert run.append(ROWS) == 5
    assert run.append(ROWS, offset=0) == 5
    assert run.pause().state is RunState.PAUSED
    assert run.resume().state is RunState.OPEN
    assert run.close().closed
    assert run.cancel().state is RunState.CANCELLED
    run.flush()
    assert run.failures("timeout") == []
    assert sync_client.why(f"{run.run_id}.0.0").endswith("has ended")
    assert sync_client.workers()[0]["worker"] == "gpu@here"
    assert sync_client.announce("policy", 3).version == 3
    with pytest.raises(ConflictError):
        sync_client.submit(model="other:", idempotency_key="one")


@pytest.mark.parametrize(("ours", "theirs"), [(Client, AsyncClient), (Run, AsyncRun)])
def test_both_faces_can_do_the_same(ours: type, theirs: type) -> None:
    inner = {"connection", "feed", "lines", "stop"}
    assert {name for name in vars(ours) if name[0] != "_"} == {
        name for name in vars(theirs) if name[0] != "_"
    } - inner


def test_leaving_early_closes_the_feed(sync_client: Client, head_beside: FakeHead) -> None:
    head_beside.held = True
    run = sync_client.submit(model="stub:", examples=ROWS)
    run.flush()
    head_beside.runs[run.run_id].end(0)
    for group in run.groups():
        assert group.example_index == 0
        break
    gc.collect()
    head_beside.runs[run.run_id].end(1)
    assert next(run.groups("1")).example_index == 1
    head_beside.held = False


def test_threads_share_a_client(sync_client: Client) -> None:
    run = sync_client.submit(model="stub:", examples=ROWS)
    seen: list[list[int]] = []
    readers = [
        threading.Thread(target=lambda: seen.append([group.example_index for group in run.groups()]))
        for _ in range(4)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert seen == [[0, 1, 2, 3, 4]] * 4


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Whoever starts tests in the background may have made them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_reaches_the_caller_and_the_client_goes_on(
    sync_client: Client, head_beside: FakeHead
) -> None:
    head_beside.held = True
    run = sync_client.submit(model="stub:", examples=ROWS)

    def interrupt() -> None:
        wait_until(lambda: any("/groups" in request for request in head_beside.seen))
        os.kill(os.getpid(), signal.SIGINT)

    beside = threading.Thread(target=interrupt)
    beside.start()
    with pytest.raises(KeyboardInterrupt):
        list(run.groups())
    beside.join()
    head_beside.held = False
    assert run.status().examples == 5


def test_what_is_closed_says_so_and_leaves_no_thread(head_beside: FakeHead) -> None:
    before = len(threads())
    client = Client(head_beside.url, TOKEN)
    run = client.submit(model="stub:", examples=ROWS)
    groups = run.groups()
    assert next(groups).example_index == 0
    client.close()
    client.close()
    assert len(threads()) == before
    for call in (client.runs, run.status, lambda: next(groups)):
        with pytest.raises(UsageError, match="this client is closed"):
            call()


def test_whoever_waits_while_it_is_closed_is_told(head_beside: FakeHead) -> None:
    head_beside.held = True
    client = Client(head_beside.url, TOKEN)
    run = client.submit(model="stub:", examples=ROWS)
    told: list[str] = []

    def read() -> None:
        try:
            list(run.groups())
        except UsageError as error:
            told.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: any("/groups" in request for request in head_beside.seen))
    client.close()
    reader.join(10)
    assert told == ["this client was closed meanwhile"]


def test_a_client_that_nobody_has_any_more_ends(head_beside: FakeHead) -> None:
    before = len(threads())
    groups = Client(head_beside.url, TOKEN).submit(model="stub:", examples=ROWS).groups()
    gc.collect()
    assert [group.example_index for group in groups] == [0, 1, 2, 3, 4]
    del groups
    gc.collect()
    wait_until(lambda: len(threads()) == before, what="the end of its thread")


def test_leaving_the_block_waits_for_the_examples(head_beside: FakeHead) -> None:
    with Client(head_beside.url, TOKEN) as client:
        run = client.submit(model="stub:", examples=ROWS)
    assert len(head_beside.runs[run.run_id].examples) == 5
    assert head_beside.runs[run.run_id].closed


def test_its_own_thread_is_refused() -> None:
    loop = BackgroundLoop(end)

    async def inside() -> None:
        loop.call(end())

    with pytest.raises(UsageError, match="cannot be used from its own thread"):
        loop.call(inside())
    loop.close()


async def end() -> None:
    pass


def test_what_is_iterated_over_is_closed_from_outside_in(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio itself would close all generators at once, the inner ones under the outer ones' hands."""
    closed = []

    async def numbers(place: int) -> AsyncGenerator[int]:
        try:
            if place == 0:
                yield 1
                return
            async with aclosing(numbers(place - 1)) as inner:
                async for number in inner:
                    yield number
        finally:
            await asyncio.sleep(0)
            closed.append(place)

    loop = BackgroundLoop(end)
    items = loop.iterate(numbers(3))
    assert next(items) == 1
    loop.close()
    assert closed == [0, 1, 2, 3]
    assert caplog.text == ""


def test_a_fork_is_told_and_harms_nobody(sync_client: Client, head_beside: FakeHead) -> None:
    """The child says so and ends as any program does; the parent's feed goes on."""
    head_beside.held = True
    run = sync_client.submit(model="stub:", examples=ROWS)
    run.flush()
    head_beside.runs[run.run_id].end(0)
    groups = run.groups()
    assert next(groups).example_index == 0
    program = f"""
import os, sys, threading
from gym_queue import Client
from gym_queue.errors import UsageError
client = Client({head_beside.url!r}, {TOKEN!r})
groups = client.run({run.run_id!r}).groups()
print(next(groups).example_index, flush=True)
child = os.fork()
if child == 0:
    try:
        client.runs()
    except UsageError as error:
        print(error, flush=True)
    with Client({head_beside.url!r}, {TOKEN!r}) as own:
        print(len(own.runs()), flush=True)
    sys.exit()
print(os.waitpid(child, 0)[1], flush=True)
print([group.example_index for group in groups], flush=True)
"""
    trainer = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program], cwd=ROOT, stdout=-1, stderr=-1, text=True
    )
    assert trainer.stdout is not None
    lines = [trainer.stdout.readline().strip() for _ in range(4)]
    assert lines == [
        "0",
        "this client belongs to the process that this one was forked from; make one here",
        "1",
        "0",
    ]
    head_beside.release()
    output, errors = trainer.communicate(timeout=30)
    assert (output, errors) == ("[1, 2, 3, 4]\n", "")
    assert [group.example_index for group in groups] == [1, 2, 3, 4]


def test_a_script_that_just_ends_ends_quietly(head_beside: FakeHead) -> None:
    program = f"""
from gym_queue import Client
client = Client({head_beside.url!r}, {TOKEN!r})
run = client.submit(model="stub:", examples=[{{"prompt": "?"}}])
run.flush()
groups = run.groups()
print(next(groups).example_index)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_a_dead_head_fails_within_the_patience_asked_for() -> None:
    with (
        pytest.raises(HeadAwayError, match="cannot be reached"),
        Client("http://127.0.0.1:9", patience=0.1) as c,
    ):
        c.runs()


def test_the_package_loads_nothing_before_it_is_asked() -> None:
    program = (
        "import sys, gym_queue; heavy = {'aiohttp', 'pydantic', 'asyncio'} & set(sys.modules);"
        "assert not heavy, heavy; assert 'Client' in dir(gym_queue) or gym_queue.Client;"
        "\ntry: gym_queue.Cliente\nexcept AttributeError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "module 'gym_queue' has no attribute 'Cliente'\n"


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = len(threads())
    yield
    gc.collect()
    wait_until(lambda: len(threads()) <= before)
