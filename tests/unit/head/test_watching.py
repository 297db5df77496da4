"""Thousands who wait for one run cost one look at its file; each hears of what is new."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import pytest

from gym_queue.coordinator.progress import ProgressFile, Written
from gym_queue.head.watching import Watch, Watchers
from gym_queue.records import RunState
from gym_queue.testing import async_wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def watchers() -> Iterator[Watchers]:
    with ThreadPoolExecutor(2) as readers:
        yield Watchers(readers)


async def looked(watchers: Watchers) -> None:
    """Wait until all files were looked at from now on."""
    looks = watchers.looks
    await async_wait_until(lambda: watchers.looks > looks + 1)


def _is_newest(watch: Watch, written: Written) -> bool:
    return watch.newest == written


async def until_final(watchers: Watchers, run_dir: Path, seen: list[int] | None = None) -> list[int]:
    """Follow a run; return the lengths that were seen, which ``seen`` is given as they come."""
    seen = [] if seen is None else seen
    async with watchers.of(run_dir) as watch:
        while True:
            known = watch.newest
            assert known is not None
            seen.append(known.rows)
            if known.final:
                return seen
            await watch.beyond(known, 60.0)


async def test_all_hear_of_what_is_new(watchers: Watchers, tmp_path: Path) -> None:
    file = ProgressFile(tmp_path)
    lengths: list[list[int]] = [[] for _ in range(1000)]
    followers = [asyncio.create_task(until_final(watchers, tmp_path, own)) for own in lengths]
    await async_wait_until(lambda: all(lengths))
    assert watchers.users == 1000
    for rows in (10, 20):
        file.write(partial(Written, rows=rows))
        await looked(watchers)
    file.write(lambda: Written(rows=20, state=RunState.ENDED))
    await asyncio.gather(*followers)
    assert all(own == [0, 10, 20, 20] for own in lengths)
    assert watchers.users == 0


async def test_one_look_is_for_all(watchers: Watchers, tmp_path: Path) -> None:
    followers = [asyncio.create_task(until_final(watchers, tmp_path)) for _ in range(500)]
    await async_wait_until(lambda: watchers.users == 500)
    files, ticks = watchers.files, watchers.looks
    await async_wait_until(lambda: watchers.looks >= ticks + 3)
    assert watchers.files - files <= watchers.looks - ticks + 1
    for follower in followers:
        follower.cancel()
    await asyncio.gather(*followers, return_exceptions=True)
    assert watchers.users == 0
    assert not watchers.is_looking


async def test_who_has_waited_long_enough_goes_on(watchers: Watchers, tmp_path: Path) -> None:
    async with watchers.of(tmp_path) as watch:
        await watch.beyond(watch.newest, 0.01)
        assert watch.newest == Written()


async def test_a_head_that_stops_lets_all_go_on(watchers: Watchers, tmp_path: Path) -> None:
    async with watchers.of(tmp_path) as watch:
        waiting = asyncio.create_task(watch.beyond(watch.newest, 60.0))
        await async_wait_until(lambda: watchers.looks > 0)
        watchers.wake()
        await asyncio.wait_for(waiting, 10.0)


async def test_what_cannot_be_read_is_tried_again(watchers: Watchers, tmp_path: Path) -> None:
    file = ProgressFile(tmp_path)
    file.write(lambda: Written(rows=1))
    async with watchers.of(tmp_path) as watch:
        path = tmp_path / "progress.json"
        path.unlink()
        path.mkdir()
        await looked(watchers)
        path.rmdir()
        file.write(lambda: Written(rows=2))
        await async_wait_until(lambda: watch.newest == Written(rows=2))


async def test_a_run_that_this_process_drives_is_heard_of_and_not_looked_at(
    watchers: Watchers, tmp_path: Path
) -> None:
    with watchers.driving(tmp_path) as tell, watchers.driving(tmp_path / "of another run") as tell_other:
        file = ProgressFile(tmp_path, tell)
        follower = asyncio.create_task(until_final(watchers, tmp_path))
        async with watchers.of(tmp_path) as watch:
            for written in (Written(rows=10), Written(rows=20), Written(rows=20, state=RunState.ENDED)):
                await asyncio.to_thread(file.write, partial(Written.model_copy, written))
                await async_wait_until(partial(_is_newest, watch, written))
            await asyncio.to_thread(file.write, partial(Written.model_copy, written))  # said already
            tell_other(Written(rows=30))
            seen = await asyncio.wait_for(follower, 10.0)
            await looked(watchers)
        tell(Written(rows=40))  # nobody waits: nobody is told
    assert seen == [0, 10, 20, 20]
    assert watchers.files == 0


async def test_a_run_that_this_process_drives_no_more_is_looked_at_again(
    watchers: Watchers, tmp_path: Path
) -> None:
    async with watchers.of(tmp_path) as watch:
        with watchers.driving(tmp_path) as tell:
            ProgressFile(tmp_path, tell).write(lambda: Written(rows=10))
            await async_wait_until(partial(_is_newest, watch, Written(rows=10)))
            ProgressFile(tmp_path).write(lambda: Written(rows=20))
            await looked(watchers)
            assert watch.newest == Written(rows=10)
        await async_wait_until(partial(_is_newest, watch, Written(rows=20)))
