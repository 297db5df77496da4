"""The pool's bookkeeping between its two threads; integration tests run it inside a worker."""

from __future__ import annotations

import asyncio
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from kombu.asynchronous import Hub

from gym_queue.celery_app import make_app
from gym_queue.settings import Settings
from gym_queue.worker.asyncio_pool import AsyncioPool, _Share

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def pool() -> Iterator[AsyncioPool]:
    pool = AsyncioPool(limit=4, app=make_app("test", Settings()))
    yield pool
    pool.loop.close()
    pool._bell.close()
    pool._ear.close()


def test_a_task_that_ends_during_a_report_is_in_the_next_one(pool: AsyncioPool) -> None:
    """The event loop's thread may be about to append when the main thread reports what it has."""
    reported: list[str] = []
    seen_by_the_loop_thread = pool._done
    seen_by_the_loop_thread.append(lambda: reported.append("first"))
    pool._report()
    seen_by_the_loop_thread.append(lambda: reported.append("second"))
    pool._report()
    assert reported == ["first", "second"]


async def test_what_the_end_of_a_task_brings_about_waits_for_nothing_else(pool: AsyncioPool) -> None:
    """Celery acknowledges with the hub's ``call_soon``, and asks for the next message after that."""
    hub, acknowledged, idle = Hub(), list[str](), list[Any]()
    pool.register_with_event_loop(hub)
    poll = hub.poller.poll

    def watched(timeout: float) -> Any:
        events = poll(0)
        if not events and not acknowledged:
            idle.append(timeout)
        return events

    hub.poller.poll = watched

    class Task:
        name = "nothing"

        async def run(self) -> None:
            pass

    share = _Share(1)
    ended = partial(pool._ended, lambda _: hub.call_soon(acknowledged.append, "one"), share, 0)
    await pool._execute(Task(), (), {}, share, ended)
    hub.run_once()
    hub.run_once()
    assert acknowledged == ["one"]
    assert idle == [], "it would have waited for so many seconds"
    hub.close()


def test_room_is_counted_in_tickets_as_large_as_the_last(pool: AsyncioPool) -> None:
    """Several tickets may come at a time, so their number must fit, not only their first."""
    qos = SimpleNamespace(value=0)
    pool.follow(qos)
    assert qos.value == 1, "nothing is known of their size yet"

    class Task:
        name = "nothing"

        def slots(self, size: int) -> int:
            return size

        async def run(self, size: int) -> None:
            pass

    tasks = {"nothing": Task()}
    pool.app.tasks.update(tasks)
    for size, held in [(1, 3), (1, 4), (2, 3)]:  # 3, 2, 0 of 4 slots are free
        pool.on_apply(
            None, ("nothing", "id", {"args": [size], "kwargs": {}}), accept_callback=lambda *_: None
        )
        assert qos.value == held


async def test_a_slot_is_free_as_soon_as_its_rollout_has_ended(pool: AsyncioPool) -> None:
    """A group whose slowest sample takes its time must not hold the slots of all others."""
    pool.follow(SimpleNamespace(value=0))
    pool.used, pool._held, pool._typical = 3, 1, 3
    seen: list[int] = []

    class Task:
        name = "group"

        async def run(self) -> None:
            for _ in range(3):
                await asyncio.create_task(self.sample())
                pool._report()
                seen.append(pool.used)

        async def sample(self) -> None:
            pool.free_slot()

    share = _Share(3)
    await pool._execute(Task(), (), {}, share, partial(pool._ended, lambda _: None, share, 1))
    assert seen == [2, 1, 1]
    pool._report()
    assert (pool.used, pool._held) == (0, 0)
