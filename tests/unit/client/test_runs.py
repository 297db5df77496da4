"""Runs through ``AsyncClient``: submitted once, fed exactly, whatever the head and the line do."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue import AsyncClient
from gym_queue.client import batches
from gym_queue.client.background import BackgroundLoop
from gym_queue.errors import (
    ConflictError,
    UsageError,
)
from gym_queue.records import Freshness, GroupPolicy, RunState
from gym_queue.testing import async_wait_until
from tests.unit.client.fake_head import TOKEN, questions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.unit.client.fake_head import FakeHead


async def test_a_run_from_examples_to_groups(client: AsyncClient, head: FakeHead) -> None:
    run = await client.submit(
        model="stub:",
        samples=2,
        examples=questions(3),
        sampling={"temperature": 0.5},
        limits={"max_turns": 4},
        groups=GroupPolicy(usable=2),
        freshness=Freshness(max_staleness=1, groups_per_version=8),
    )
    groups = [group async for group in run.groups()]
    assert [group.example_index for group in groups] == [0, 1, 2]
    assert groups[0].rewards == [0.0, 1.0]
    assert [group.cursor for group in groups] == ["1", "2", "3"]
    view = await run.status()
    assert (view.state, view.closed, view.examples) == (RunState.ENDED, True, 3)
    asked = head.runs[run.run_id].request
    assert (asked.sampling.temperature, asked.groups.usable) == (0.5, 2)
    assert asked.freshness == Freshness(max_staleness=1, groups_per_version=8)
    assert (await run.metrics())["rollouts"] == {"ended": 6}


async def test_groups_come_while_examples_still_go_in(client: AsyncClient) -> None:
    seen = asyncio.Event()

    async def slowly() -> AsyncIterator[dict[str, Any]]:
        for row in questions(batches.MOST_ROWS + 1):
            yield row
        await seen.wait()  # the first batch is there, and its groups are seen
        yield {"id": "last", "prompt": "?"}

    run = await client.submit(model="stub:", examples=slowly())
    ids = []
    async for group in run.groups():
        seen.set()
        ids.append(group.example_id)
    assert ids == [*map(str, range(batches.MOST_ROWS + 1)), "last"]


async def test_rollouts_are_typed_by_how_they_ended(client: AsyncClient) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "?", "colour": "red"}, {"prompt": "?", "fails": True}]
    run = await client.submit(model="stub:", examples=rows)
    good, bad = [rollout async for rollout in run.rollouts()]
    assert good.state == "succeeded"
    assert good.reward == 0.0
    assert good.model_extra == {"colour": "red"}
    assert bad.state == "failed"
    assert (bad.failure_class, bad.cursor) == ("verifier", "2-0")
    assert [row["class"] for row in await run.failures()] == ["verifier"]
    assert await run.failures("timeout") == []


async def test_a_file_goes_in_as_it_is(client: AsyncClient, head: FakeHead, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\n  {"prompt": "\xc3\xa4"}')
    run = await client.submit(model="stub:", examples=str(path))
    assert len([group async for group in run.groups()]) == 2
    assert head.runs[run.run_id].examples == [{"prompt": "a"}, {"prompt": "ä"}]


async def test_batches_are_bounded_by_rows_and_bytes(client: AsyncClient, head: FakeHead) -> None:
    run = await client.submit(model="stub:")
    assert await run.append(questions(batches.MOST_ROWS + 1)) == batches.MOST_ROWS + 1
    large = {"prompt": "x" * (batches.MOST_BYTES * 2 // 3)}
    huge = {"prompt": "x" * (batches.MOST_BYTES * 2)}
    await run.append([large, large, huge, {"prompt": "x"}])
    assert head.runs[run.run_id].bodies == [batches.MOST_ROWS, 1, 1, 1, 1, 1]
    assert (await run.close()).closed


async def test_environments_bring_their_own(client: AsyncClient) -> None:
    parts = [{"name": "reasoning_gym:chain_sum", "size": 2}, {"name": "count", "size": 1}]
    run = await client.submit(model="stub:", environments=parts)
    assert len([group async for group in run.groups()]) == 3
    with pytest.raises(UsageError, match="give either, not both"):
        await client.submit(model="stub:", environments=parts, examples=[])


async def test_a_lost_answer_makes_no_second_run_and_no_second_example(
    client: AsyncClient, head: FakeHead
) -> None:
    head.lost = {"runs", "examples", "close"}
    run = await client.submit(model="stub:", examples=questions(3))
    assert [group.example_index async for group in run.groups()] == [0, 1, 2]
    assert len(head.runs) == 1
    assert head.runs[run.run_id].bodies == [3, 3]


async def test_the_same_key_is_the_same_run(client: AsyncClient) -> None:
    first = await client.submit(model="stub:", examples=questions(3), idempotency_key="night")
    await first.flush()
    second = await client.submit(model="stub:", examples=questions(3), idempotency_key="night")
    assert second.run_id == first.run_id
    assert [group.example_index async for group in second.groups()] == [0, 1, 2]
    with pytest.raises(ConflictError, match="same idempotency key was used with another body"):
        await client.submit(model="other:", examples=questions(3), idempotency_key="night")


async def test_a_submission_that_died_halfway_goes_on(client: AsyncClient, head: FakeHead) -> None:
    first = await client.submit(model="stub:", idempotency_key="night")
    await first.append(questions(2))
    second = await client.submit(model="stub:", examples=questions(3), idempotency_key="night")
    assert [group.example_id async for group in second.groups()] == ["0", "1", "2"]
    third = await client.submit(model="stub:", idempotency_key="other")
    await third.append(questions(1))
    fourth = await client.submit(model="stub:", examples=[{"prompt": "new"}], idempotency_key="other")
    with pytest.raises(ConflictError, match="other examples there"):
        await fourth.flush()
    head.runs[fourth.run_id].closed = True
    client._submitted.remove(fourth)


async def test_a_feed_that_breaks_in_the_middle_of_lines_goes_on(client: AsyncClient, head: FakeHead) -> None:
    head.cuts = [0, 1, 0, 2]
    run = await client.submit(model="stub:", samples=2, examples=questions(9))
    assert [group.example_index async for group in run.groups()] == list(range(9))
    head.cuts = [3, 0, 5]
    places = [(row.example_index, row.sample_index) async for row in run.rollouts()]
    assert places == [(example, sample) for example in range(9) for sample in range(2)]
    assert sum("/groups" in request for request in head.seen) == 5


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_a_head_that_is_busy_or_behind_a_broken_proxy_is_asked_again(
    client: AsyncClient, head: FakeHead, status: int
) -> None:
    head.statuses = [status]
    run = await client.submit(model="stub:", examples=questions(2))
    head.statuses = [status, status]
    assert [group.example_index async for group in run.groups()] == [0, 1]


async def test_a_head_that_restarts_is_waited_for_and_that_is_said_once(
    client: AsyncClient, head: FakeHead, caplog: pytest.LogCaptureFixture
) -> None:
    head.held = True
    run = await client.submit(model="stub:", examples=questions(3))
    await run.flush()
    head.runs[run.run_id].end(0)
    groups = run.groups()
    seen = [(await anext(groups)).example_index]
    await head.stop()
    waiting = asyncio.ensure_future(anext(groups))
    await async_wait_until(lambda: "trying again" in caplog.text, what="a word of the outage")
    tried = len(caplog.records)
    await head.start()
    head.release()
    seen.append((await waiting).example_index)
    seen += [group.example_index async for group in groups]
    assert seen == [0, 1, 2]
    assert caplog.text.count("trying again") == 1, caplog.text
    assert caplog.text.count("answers again") == 1
    assert tried == 1


async def test_a_reader_that_died_goes_on_behind_its_cursor(client: AsyncClient, head: FakeHead) -> None:
    run = await client.submit(model="stub:", examples=questions(5))
    seen = []
    async for group in run.groups():
        seen.append(group)
        if len(seen) == 2:
            break
    async with AsyncClient(head.url, TOKEN) as another:
        again = await another.run(run.run_id)
        rest = [group.example_index async for group in again.groups(seen[-1].cursor)]
    assert rest == [2, 3, 4]


async def test_a_feed_without_a_sign_of_life_is_opened_again(head: FakeHead) -> None:
    async with AsyncClient(head.url, TOKEN, silence=0.3) as client:
        run = await client.submit(model="stub:", examples=questions(2))
        head.mute = 1
        assert [group.example_index async for group in run.groups()] == [0, 1]
        assert sum("/groups" in request for request in head.seen) == 2


async def test_signs_of_life_keep_a_feed_open(head: FakeHead) -> None:
    async with AsyncClient(head.url, TOKEN, silence=0.5) as client:
        head.held = True
        run = await client.submit(model="stub:", examples=questions(1))
        waiting = asyncio.ensure_future(anext(run.groups()))
        await asyncio.wait([waiting], timeout=1.0)
        head.release()
        assert (await waiting).example_index == 0
        assert sum("/groups" in request for request in head.seen) == 1


async def test_a_line_of_megabytes(client: AsyncClient) -> None:
    run = await client.submit(model="stub:", examples=[{"prompt": "?", "length": 3_000_000}])
    [group] = [group async for group in run.groups()]
    assert len(group.rollouts[0]["messages"][0]["content"]) == 3_000_000


async def test_steering(client: AsyncClient) -> None:
    run = await client.submit(model="stub:")
    assert (await run.pause()).state is RunState.PAUSED
    assert [view.run_id for view in await client.runs("paused")] == [run.run_id]
    assert await client.runs("ended") == []
    assert (await run.resume()).state is RunState.OPEN
    assert (await run.cancel()).state is RunState.CANCELLED
    assert [group async for group in run.groups()] == []
    assert [view.state for view in await client.runs()] == [RunState.CANCELLED]
    assert await client.workers() == [{"worker": "gpu@here", "healthy": True}]
    assert await client.why(f"{run.run_id}.0.0") == f"{run.run_id}.0.0 has ended"


async def test_weights_are_announced_once(client: AsyncClient, head: FakeHead) -> None:
    head.lost = {"versions"}
    await client.announce("policy", 1, "file:///weights/1")
    await client.announce("policy", 1, "file:///weights/1")
    assert head.versions["policy"]["version"] == 1
    with pytest.raises(ConflictError, match="version 1 was announced already"):
        await client.announce("policy", 1, "file:///weights/other")
    with pytest.raises(ConflictError, match="version 1 was announced already"):
        await client.announce("policy", 0)


async def test_a_client_that_is_closed_early_says_what_was_left(
    head: FakeHead, caplog: pytest.LogCaptureFixture
) -> None:
    client = AsyncClient(head.url, TOKEN)

    async def endless() -> AsyncIterator[dict[str, Any]]:
        yield {"prompt": "?"}
        await asyncio.Event().wait()

    run = await client.submit(model="stub:", examples=endless())
    waiting = asyncio.ensure_future(anext(run.groups(), None))
    await async_wait_until(lambda: any("/groups" in request for request in head.seen))
    await client.close()
    assert f"not all examples of run {run.run_id} were submitted; it is still open" in caplog.text
    with pytest.raises(UsageError, match="closed before all examples were submitted"):
        await waiting


def test_json_is_compact_and_keeps_its_letters() -> None:
    line = batches.encoded({"prompt": "ä", "n": [1, 2]}, 0)
    assert line == '{"prompt":"ä","n":[1,2]}\n'.encode()
    assert json.loads(line) == {"prompt": "ä", "n": [1, 2]}


async def test_a_client_belongs_to_the_event_loop_that_used_it_first(head: FakeHead) -> None:
    client = AsyncClient(head.url, TOKEN)
    beside = BackgroundLoop(client.close)
    assert await asyncio.to_thread(lambda: beside.call(client.runs())) == []
    with pytest.raises(UsageError, match="belongs to another process or event loop"):
        await client.runs()
    await asyncio.to_thread(beside.close)
