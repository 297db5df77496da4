from __future__ import annotations

import asyncio

import pytest

from gym_queue.coordinator.sidework import beside


async def forever(ended: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        ended.append("helper")


async def fail() -> None:
    await asyncio.sleep(0)
    raise ZeroDivisionError


async def end() -> None:
    await asyncio.sleep(0)


async def test_helpers_end_with_the_block() -> None:
    ended: list[str] = []
    async with beside(forever(ended)) as during:
        await during(asyncio.sleep(0))
        assert ended == []
    assert ended == ["helper"]


async def test_a_helper_that_fails_takes_the_work_along() -> None:
    ended: list[str] = []
    with pytest.raises(ZeroDivisionError):
        async with beside(end(), fail(), forever(ended)) as during:
            await during(forever(ended))
    assert ended == ["helper", "helper"]


async def test_a_helper_that_ends_is_no_failure() -> None:
    async with beside(end()) as during:
        assert await during(asyncio.sleep(0.01, "done")) == "done"
        assert await during(asyncio.sleep(0, "again")) == "again"
