"""The pool's bookkeeping between its two threads; integration tests run it inside a worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gym_queue.celery_app import make_app
from gym_queue.settings import Settings
from gym_queue.worker.asyncio_pool import AsyncioPool

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def pool() -> Iterator[AsyncioPool]:
    pool = AsyncioPool(limit=4, app=make_app("test", Settings()))
    yield pool
    pool.loop.close()


def test_a_task_that_ends_during_a_report_is_in_the_next_one(pool: AsyncioPool) -> None:
    """The event loop's thread may be about to append when the main thread reports what it has."""
    reported: list[str] = []
    seen_by_the_loop_thread = pool._done
    seen_by_the_loop_thread.append(lambda: reported.append("first"))
    pool._report()
    seen_by_the_loop_thread.append(lambda: reported.append("second"))
    pool._report()
    assert reported == ["first", "second"]
