"""When a verifier's time is over. Integration tests run the pool inside a worker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gym_queue.records import FailureClass
from gym_queue.worker import prefork_pool
from gym_queue.worker.prefork_pool import _Children
from tests.unit.silent_fleet import Clock

CHILD = 3


class Children:
    """One child of a parent that looks after it, and a clock of our own."""

    look_after = _Children.look_after

    def __init__(self, clock: Clock) -> None:
        self._pool = [SimpleNamespace(index=CHILD, pid=1)]
        self._looked_at = clock()
        self._clock = clock
        self.killed: list[tuple[Any, ...]] = []

    def end(self, *reason: object) -> None:
        self.killed.append(reason)

    def maintain_pool(self) -> None:
        """Nobody has died."""

    def pass_(self, seconds: float) -> None:
        """Look after the child for so long."""
        for _ in range(int(seconds / 0.25)):
            self._clock.pass_(0.25)
            self.look_after()  # type: ignore[misc]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(prefork_pool, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(prefork_pool, "DEADLINES", prefork_pool.Deadlines(CHILD + 1))
    return clock


def test_a_child_has_its_time_and_a_moment_to_give_up_by_itself(clock: Clock) -> None:
    children = Children(clock)
    prefork_pool.DEADLINES.write(CHILD, 5.0)
    children.pass_(6.0)
    assert children.killed == []
    children.pass_(0.25)
    assert children.killed == [(1, FailureClass.TIMEOUT, "verifying took longer than 5 s")]


def test_a_child_that_is_done_is_left_alone(clock: Clock) -> None:
    children = Children(clock)
    prefork_pool.DEADLINES.write(CHILD, 5.0)
    prefork_pool.DEADLINES.write(CHILD, None)
    children.pass_(10.0)
    assert children.killed == []


def test_a_parent_that_stood_still_takes_no_time_from_its_child(clock: Clock) -> None:
    children = Children(clock)
    prefork_pool.DEADLINES.write(CHILD, 5.0)
    for _ in range(2):
        children.pass_(2.0)
        clock.pass_(100.0)
        children.look_after()  # type: ignore[misc]
    children.pass_(2.0)
    assert children.killed == []
    children.pass_(0.25)
    assert len(children.killed) == 1


def test_what_begins_after_a_standstill_has_no_more_time_than_others(clock: Clock) -> None:
    children = Children(clock)
    clock.pass_(100.0)
    children.look_after()  # type: ignore[misc]
    prefork_pool.DEADLINES.write(CHILD, 5.0)
    children.pass_(6.25)
    assert len(children.killed) == 1
