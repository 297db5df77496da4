"""Cancelled is final, reaches work in flight, and a canceller that dies is finished for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.errors import LedgerError
from gym_queue.ledger.base import Retry
from gym_queue.maintenance.cancel import cancel_rollout, cancel_run, cancel_samples, finish_cancelled
from gym_queue.records import RunState
from gym_queue.testing import async_wait_until
from tests.unit.road import RUN, Engine, Gate, Road, World, group, run_spec

if TYPE_CHECKING:
    from gym_queue.ledger.base import Ended, Ledger, OpenRollout


async def test_g1_a_cancelled_run_ends_all_that_is_open(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gym_queue.maintenance.cancel._BATCH", 3)
    road = Road(World(inline=False), ledger=ledger)
    done, waits, runs, retried, *_ = await road.submit(*(group(index, [0]) for index in range(8)))
    await road.work(done)
    await road.pipeline.generate(waits)
    claim = await ledger.claim(runs, "gpu", 60.0)
    assert claim is not None
    again = await ledger.claim(retried, "gpu", 60.0)
    assert again is not None
    await ledger.commit(again.samples[0].fence, Retry(delay=100.0))
    assert await cancel_run(ledger, RUN, "not wanted any more") == 7
    assert await cancel_run(ledger, RUN, "again") == 0
    status = await ledger.run(RUN)
    assert status is not None
    assert (status.state, status.accepted, status.succeeded, status.cancelled) == (
        RunState.CANCELLED,
        8,
        1,
        7,
    )
    rows = {row["example_index"]: row for row in await road.rows()}
    assert sorted(rows) == list(range(8))
    assert (rows[2]["state"], rows[2]["class"], rows[2]["error"]) == (
        "cancelled",
        None,
        "not wanted any more",
    )
    assert await ledger.revoked("gpu", 10) == [claim.samples[0].fence]
    assert not (await ledger.commit(claim.samples[0].fence, Retry())).accepted


async def test_cancelling_reaches_work_in_flight() -> None:
    gate = Gate()
    road = Road(engine=Engine(gate))
    (ticket,) = await road.submit(group(0))
    task = asyncio.create_task(road.pipeline.generate(ticket))
    await async_wait_until(lambda: gate.waiting == 2)
    await cancel_run(road.ledger, RUN, "not wanted any more")
    assert road.pipeline.drop(await road.ledger.revoked("gpu", 10)) == 2
    await task
    assert [row["state"] for row in await road.rows()] == ["cancelled"] * 2


async def test_a_canceller_that_died_is_finished_for(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    road = Road(ledger=ledger)
    await road.submit(group(0), group(1))
    end, answers = ledger.end, [True]

    async def once(run_id: str, ended: Ended, *, waiting_attempt: int | None = None) -> bool:
        if not answers:
            raise LedgerError
        answers.clear()
        return await end(run_id, ended, waiting_attempt=waiting_attempt)

    monkeypatch.setattr(ledger, "end", once)
    with pytest.raises(LedgerError):
        await cancel_run(ledger, RUN, "not wanted any more")
    monkeypatch.setattr(ledger, "end", end)
    assert await finish_cancelled(ledger) == 3
    assert await finish_cancelled(ledger) == 0
    assert [row["state"] for row in await road.rows()] == ["cancelled"] * 4


async def test_runs_that_are_not_cancelled_are_left_alone(ledger: Ledger) -> None:
    road = Road(ledger=ledger)
    await road.submit(group(0))
    assert await finish_cancelled(ledger) == 0
    await ledger.set_run_state(RUN, RunState.ENDED)
    assert await cancel_run(ledger, RUN, "too late") == 0
    assert await cancel_run(ledger, "no such run", "in vain") == 0
    assert await road.events() == []


async def test_one_rollout_can_be_cancelled(ledger: Ledger) -> None:
    road = Road(ledger=ledger)
    one, two = await road.submit(group(0), group(1))
    assert await cancel_rollout(ledger, RUN, 1, 1, "a bad prompt")
    assert not await cancel_rollout(ledger, RUN, 1, 1, "a bad prompt")
    assert not await cancel_rollout(ledger, RUN, 7, 0, "no such rollout")
    assert not await cancel_rollout(ledger, "no such run", 0, 0, "in vain")
    await road.work(one, two)
    rows = {(row["example_index"], row["sample_index"]): row for row in await road.rows()}
    assert len(rows) == 4
    assert (rows[1, 1]["state"], rows[1, 1]["error"]) == ("cancelled", "a bad prompt")
    assert [row["state"] for place, row in sorted(rows.items()) if place != (1, 1)] == ["succeeded"] * 3


async def test_the_open_samples_of_some_examples_can_be_cancelled(ledger: Ledger) -> None:
    road = Road(World(inline=False), ledger=ledger)
    one, two, three = await road.submit(*map(group, range(3)))
    claim = await ledger.claim(two, "gpu", 60.0)
    assert claim is not None
    reasons = {0: "its group has 2 of 4", 1: "its group is dropped", 7: "never was"}
    assert await cancel_samples(ledger, run_spec(), reasons) == 4
    assert await cancel_samples(ledger, run_spec(), reasons) == 0
    assert await ledger.revoked("gpu", 10) == [sample.fence for sample in claim.samples]
    await road.work(one, three)
    rows = {(row["example_index"], row["sample_index"]): row for row in await road.rows()}
    assert [(row["state"], row.get("error")) for _, row in sorted(rows.items())] == [
        ("cancelled", "its group has 2 of 4"),
        ("cancelled", "its group has 2 of 4"),
        ("cancelled", "its group is dropped"),
        ("cancelled", "its group is dropped"),
        ("succeeded", None),
        ("succeeded", None),
    ]


async def test_who_cancels_a_few_samples_does_not_look_at_all(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    road = Road(ledger=ledger)
    await road.submit(*map(group, range(50)))
    look, seen = ledger.open_rollouts, []

    async def count(*arguments: Any) -> list[OpenRollout]:
        found = await look(*arguments)
        seen.append(len(found))
        return found

    monkeypatch.setattr(ledger, "open_rollouts", count)
    assert await cancel_samples(ledger, run_spec(), {7: "a", 30: "b"}) == 4
    assert await cancel_rollout(ledger, RUN, 40, 1, "a bad prompt")
    assert seen == [4, 2]
