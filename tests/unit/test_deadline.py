"""A deadline says whose fault it was: of whom it was set to, or of a process that did not run."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from gym_queue.deadline import STANDSTILL, Deadline
from gym_queue.errors import StageTimeoutError, WorkerStoodStillError
from gym_queue.records import FailureClass
from tests.unit.standstill import stand_still

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def within(seconds: float, body: Callable[[], Awaitable[object]]) -> None:
    async with Deadline(seconds, "too long"):
        await body()


async def for_ever() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("seconds", [0.01, 0.0, -60.0])
async def test_what_takes_too_long_is_ended(seconds: float) -> None:
    with pytest.raises(StageTimeoutError, match=r"^too long$"):
        await within(seconds, for_ever)


async def test_a_deadline_that_strikes_late_blames_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    async def frozen() -> None:
        stand_still(monkeypatch, 15.0)
        await for_ever()

    with pytest.raises(
        WorkerStoodStillError, match=r"^the worker stood still for 12\.\d s or longer$"
    ) as caught:
        await within(3.0, frozen)
    assert caught.value.failure_class is FailureClass.INFRASTRUCTURE


async def test_a_busy_event_loop_is_no_standstill(monkeypatch: pytest.MonkeyPatch) -> None:
    async def delayed() -> None:
        stand_still(monkeypatch, 3.0 + STANDSTILL / 2)
        await for_ever()

    with pytest.raises(StageTimeoutError):
        await within(3.0, delayed)


async def test_who_is_slow_to_be_ended_is_no_standstill(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow() -> None:
        try:
            await for_ever()
        finally:
            stand_still(monkeypatch, 15.0)

    with pytest.raises(StageTimeoutError):
        await within(0.0, slow)


async def test_nothing_strikes_afterwards(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def quick() -> None:
        await asyncio.sleep(0)

    await within(3.0, quick)
    stand_still(monkeypatch, 15.0)
    await asyncio.sleep(0.01)  # time for whatever is due
    assert caplog.text == ""


async def gives_up() -> None:
    try:
        await for_ever()
    except asyncio.CancelledError as error:
        raise ValueError from error


async def fails() -> None:
    raise TimeoutError


@pytest.mark.parametrize(
    ("body", "seconds", "kind"), [(gives_up, 0.0, StageTimeoutError), (fails, 5.0, TimeoutError)]
)
async def test_errors_of_the_body_are_its_own_unless_the_deadline_caused_them(
    body: Callable[[], Awaitable[object]], seconds: float, kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        await within(seconds, body)
