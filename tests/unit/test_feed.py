"""What readers of a run see, and from where they may go on."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING

import pytest

from gym_queue.api import GroupRow
from gym_queue.coordinator import feed as module
from gym_queue.coordinator import progress
from gym_queue.coordinator.feed import Feed, Page
from gym_queue.errors import StorageError, UsageError
from gym_queue.records import GroupPolicy, RunState
from tests.unit.output_rows import ended
from tests.unit.written_run import Stream, Writer

if TYPE_CHECKING:
    from pathlib import Path

    from gym_queue.ledger.base import Event

POLICY = GroupPolicy(usable=2, drop_uniform=True)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run-1" / "rollouts.jsonl"


def writer(out: Path) -> Writer:
    out.parent.mkdir(exist_ok=True)
    return Writer(out, Stream(), POLICY)


def group(index: int, *rewards: float, version: int | None = None) -> list[Event]:
    return [ended(index, number, reward=reward, version=version) for number, reward in enumerate(rewards)]


def size(path: Path) -> int:
    return path.stat().st_size


def data(page: Page) -> list[bytes]:
    return [item.data for item in page.items]


def test_a_run_that_has_written_nothing_is_empty(out: Path) -> None:
    feed = Feed(out)
    assert feed.rollouts() == Page([], "0-0", None)
    assert feed.groups() == Page([], "0", None)
    assert feed.written().state is RunState.OPEN


async def test_rows_come_as_they_were_written_and_from_any_cursor_on(out: Path) -> None:
    events = [
        ended(0, 0),
        ended(0, 1, state="failed"),
        ended(1, 0),
        ended(1, 1),
        ended(2, 0, state="cancelled"),
    ]
    feed = Feed(out)
    async with writer(out) as run:
        await run.write(*events[:2])
        first = feed.rollouts()
        await run.write(*events[2:])
        second = feed.rollouts(first.cursor)
        assert data(first) + data(second) == [event.row for event in events]
        assert second.ended is None
        items = first.items + second.items
        for number, item in enumerate(items, 1):
            rest = feed.rollouts(item.cursor)
            assert sorted(data(rest)) == sorted(event.row for event in events[number:])
        assert sorted(data_of(feed)) == sorted(event.row for event in events)
        await run.finish(RunState.ENDED)
        assert feed.rollouts(second.cursor) == Page([], second.cursor, RunState.ENDED)
        assert feed.rollouts(first.cursor).ended is RunState.ENDED
        assert feed.rollouts("", limit=4).ended is None, "there is one more"


def data_of(feed: Feed) -> list[bytes]:
    """Return all rollouts, in the order in which they are read one by one."""
    found, cursor = [], ""
    while (page := feed.rollouts(cursor, limit=1)).items:
        found += data(page)
        cursor = page.cursor
    return found


async def test_failures_do_not_wait_for_all_rows_that_succeeded(out: Path) -> None:
    async with writer(out) as run:
        rows = [ended(index, 0) for index in range(20)]
        await run.write(*rows, *(ended(index, 1, state="failed") for index in range(20)))
    states = [json.loads(row)["state"] for row in data(Feed(out).rollouts("", limit=6))]
    assert states == ["succeeded"] * 3 + ["failed"] * 3
    assert len(Feed(out).rollouts("", limit=7).items) == 7


async def test_nobody_reads_further_than_what_is_durable(out: Path) -> None:
    async with writer(out) as run:
        await run.write(ended(0, 0))
    with out.open("ab") as file:
        file.write(ended(1, 0).row + b"\n")
    page = Feed(out).rollouts()
    assert data(page) == [ended(0, 0).row]
    assert Feed(out).rollouts(f"{size(out)}-0").items == [], "it was said before a crash of the machine"


async def test_groups_come_with_their_rows_and_dropped_ones_only_if_asked_for(out: Path) -> None:
    feed = Feed(out)
    complete, uniform = group(4, 1.0, 0.0, 0.5, version=3), group(2, 1.0, 1.0)
    short = [ended(7, number, state="failed") for number in range(2)]
    async with writer(out) as run:
        await run.write(*uniform, *complete, *short)
        page = feed.groups()
        (row,) = [GroupRow.model_validate_json(item) for item in data(page)]
        assert row == GroupRow(
            run_id="run-1",
            example_id="example-4",
            example_index=4,
            outcome="complete",
            weight_version=3,
            rollouts=tuple(json.loads(event.row) for event in complete[:2]),
        )
        assert b",".join(event.row for event in complete[:2]) in data(page)[0], "byte by byte"
        assert feed.groups(page.cursor) == Page([], page.cursor, None)
        everything = feed.groups(dropped=True)
        rows = [GroupRow.model_validate_json(item) for item in data(everything)]
        assert [(row.example_index, row.outcome, len(row.rollouts)) for row in rows] == [
            (2, "uniform", 0),
            (4, "complete", 2),
            (7, "short", 0),
        ]
        assert everything.cursor == page.cursor, "who did not want the dropped ones is behind them too"
        assert data(feed.groups(everything.items[0].cursor)) == data(page)
        await run.finish(RunState.CANCELLED)
        assert feed.groups(page.cursor).ended is RunState.CANCELLED
        assert feed.groups(everything.items[1].cursor).ended is RunState.CANCELLED
        assert feed.groups(limit=1, dropped=True).ended is None


@pytest.mark.parametrize(
    ("cursor", "sentence"),
    [
        ("x", "'x' is no cursor of rollouts"),
        ("5", "'5' is no cursor of rollouts"),
        ("-1-0", "is no cursor of rollouts"),
        ("٣-0", "is no cursor of rollouts"),
        ("9" * 30 + "-0", "is no cursor of rollouts"),
        ("1-0", "1 is within a line of rollouts.jsonl"),
        ("99999-0", "99999 is behind the end of rollouts.jsonl"),
        ("0-1", "1 is behind the end of rollouts.failures.jsonl"),
    ],
)
async def test_a_cursor_that_cannot_have_come_from_here_is_refused(
    out: Path, cursor: str, sentence: str
) -> None:
    async with writer(out) as run:
        await run.write(ended(0, 0))
    with pytest.raises(UsageError, match=sentence):
        Feed(out).rollouts(cursor)


async def test_cursors_of_groups_are_looked_at_too(out: Path) -> None:
    with pytest.raises(UsageError, match=r"7 is behind the end of groups.jsonl"):
        Feed(out).groups("7")
    async with writer(out) as run:
        await run.write(*group(0, 1.0, 0.0))
    for cursor, sentence in [("0-0", "is no cursor of groups"), ("7", "7 is within a line of groups.jsonl")]:
        with pytest.raises(UsageError, match=sentence):
            Feed(out).groups(cursor)
    with pytest.raises(UsageError, match="is no cursor of groups"):
        await Feed(out).wait_for_groups("x", 0.0)
    with pytest.raises(UsageError, match="is no cursor of rollouts"):
        await Feed(out).wait_for_rollouts("x", 0.0)


async def test_a_page_is_no_longer_than_memory_allows(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [ended(index, 0, padding="x" * 1000) for index in range(10)]
    groups = [event for index in range(10, 20) for event in group(index, 1.0, 0.0)]
    async with writer(out) as run:
        await run.write(*rows, *groups)
    feed = Feed(out)
    monkeypatch.setattr(module, "LARGEST_PAGE", 3000)
    assert len(feed.rollouts().items) == 3
    assert len(data_of(feed)) == len(rows) + len(groups)
    monkeypatch.setattr(module, "LARGEST_PAGE", 1)
    assert data(feed.groups()) == data(feed.groups(limit=1)), "one, however large"
    monkeypatch.setattr(module, "_MOST_LINES", 4)
    monkeypatch.setattr(module, "LARGEST_PAGE", 2**20)
    assert len(feed.groups().items) == 4


async def test_rows_that_are_gone_are_an_error_and_no_group_without_them(out: Path) -> None:
    async with writer(out) as run:
        await run.write(*group(0, 1.0, 0.0))
    os.truncate(out, 0)
    with pytest.raises(StorageError, match="is shorter than it was"):
        Feed(out).groups()


async def test_who_waits_is_told_as_soon_as_there_is_more(out: Path) -> None:
    feed, other = Feed(out), Feed(out)
    async with writer(out) as run:
        assert not await feed.wait_for_rollouts("", 0.0)
        waiting = [
            asyncio.create_task(one)
            for one in (feed.wait_for_rollouts("", 60), other.wait_for_groups("", 60))
        ]
        await run.write(ended(0, 0))
        assert await waiting[0]
        cursor = feed.rollouts().cursor
        assert not await feed.wait_for_rollouts(cursor, 0.0)
        assert not waiting[1].done()
        await run.write(ended(0, 1, reward=0.0))
        assert await waiting[1]
        cursor = other.groups().cursor
        assert not await other.wait_for_groups(cursor, 0.0)
        waiting[0] = asyncio.create_task(other.wait_for_groups(cursor, 60))
        await run.finish(RunState.ENDED)
        assert await waiting[0]
        assert await Feed(out).wait_for_rollouts("", 60)


async def test_progress_says_what_is_there(out: Path) -> None:
    async with writer(out) as run:
        await run.write(*group(0, 1.0, 0.0), *group(1, 0.5, 0.5), ended(0, 2, state="cancelled"))
        written = Feed(out).written()
        assert written.rows == size(out)
        assert written.failures == size(out.parent / "rollouts.failures.jsonl")
        assert written.groups == size(out.parent / "rollouts.run" / "groups.jsonl")
        assert (written.rollouts.succeeded, written.rollouts.cancelled) == (4, 1)
        assert (written.decided.complete, written.decided.uniform) == (1, 1)
        assert (written.reward_mean, written.examples, written.final) == (0.5, 100, False)
        await run.finish(RunState.ENDED)
    written = Feed(out).written()
    assert (written.final, written.rollouts.accepted) == (True, 5)


@pytest.mark.parametrize("content", [b"", b'{"rows": 5', b"null"])
async def test_a_progress_file_that_a_crash_of_the_machine_has_emptied_is_written_anew(
    out: Path, content: bytes
) -> None:
    async with writer(out) as run:
        await run.write(*group(0, 1.0, 0.0))
    before = Feed(out).written()
    file = out.parent / "rollouts.run" / progress.NAME
    file.write_bytes(content)
    assert Feed(out).written() == progress.Written()
    assert Feed(out).rollouts(f"{before.rows}-0") == Page([], f"{before.rows}-0", None)
    async with writer(out) as run:
        await run.begin()
    assert Feed(out).written() == before


def test_only_how_a_run_ended_is_synced_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, synced = os.fsync, list[int]()

    def seen(file: int) -> None:
        synced.append(file)
        sync(file)

    monkeypatch.setattr(os, "fsync", seen)
    file = progress.ProgressFile(tmp_path)
    file.write(lambda: progress.Written(rows=5))
    assert synced == []
    file.write(lambda: progress.Written(rows=5, state=RunState.ENDED))
    assert synced
    assert progress.read(tmp_path).state is RunState.ENDED
    assert [path.name for path in tmp_path.iterdir()] == [progress.NAME]


def test_what_was_said_last_is_not_said_again(tmp_path: Path) -> None:
    file = progress.ProgressFile(tmp_path)
    file.write(lambda: progress.Written(rows=5))
    (tmp_path / progress.NAME).unlink()
    file.write(lambda: progress.Written(rows=5))
    assert progress.read(tmp_path) == progress.Written()
    file.write(lambda: progress.Written(rows=6))
    assert progress.read(tmp_path).rows == 6
