"""No rollout waits, or lasts, longer than its run allows (G7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gym_queue.ledger.base import Retry
from gym_queue.maintenance.expire import expire
from gym_queue.records import Limits, RunState
from tests.unit.road import RUN, World, group
from tests.unit.silent_fleet import Fleet

if TYPE_CHECKING:
    from gym_queue.ledger.base import OpenRollout

LIMITS = Limits(queue_timeout=100.0, rollout_timeout=1000.0)


@pytest.mark.guarantee("G7")
async def test_g7_who_waited_too_long_for_a_worker_is_failed_as_timeout() -> None:
    fleet = Fleet()
    _, claimed = await fleet.submit(group(0, [0]), group(1, [0]), limits=LIMITS)
    fleet.clock.pass_(100)
    await fleet.claim(claimed, "gpu")
    assert await expire(fleet.ledger) == 0
    fleet.clock.pass_(1)
    assert await expire(fleet.ledger) == 1
    (row,) = await fleet.rows()
    assert (row["example_index"], row["state"], row["class"], row["stage"]) == (
        0,
        "failed",
        "timeout",
        "generate",
    )
    assert row["error"] == "no worker took it within 100 s (queue_timeout)"
    assert row["timings"]["ended_at"] - row["timings"]["accepted_at"] == 101


async def test_g7_each_wait_counts_for_itself() -> None:
    fleet = Fleet(World(inline=False))
    one, two, three = await fleet.submit(*(group(index, [0]) for index in range(3)), limits=LIMITS)
    fleet.clock.pass_(90)
    await fleet.pipeline.generate(one)
    claim = await fleet.claim(two, "gpu")
    await fleet.ledger.commit(claim.samples[0].fence, Retry())
    claim = await fleet.claim(three, "gpu")
    await fleet.ledger.commit(claim.samples[0].fence, Retry(delay=60.0))
    fleet.clock.pass_(100)
    assert await expire(fleet.ledger) == 0
    fleet.clock.pass_(1)
    assert await expire(fleet.ledger) == 2
    assert {(row["example_index"], row["stage"]) for row in await fleet.rows()} == {
        (0, "verify"),
        (1, "generate"),
    }
    await fleet.ledger.promote_due(10)
    fleet.clock.pass_(59)
    assert await expire(fleet.ledger) == 0
    fleet.clock.pass_(1)
    assert await expire(fleet.ledger) == 1


@pytest.mark.guarantee("G7")
async def test_g7_a_rollout_that_lasts_too_long_is_ended_whatever_it_does() -> None:
    fleet = Fleet()
    running, waiting = await fleet.submit(
        group(0, [0]), group(1, [0]), limits=Limits(queue_timeout=5000.0, rollout_timeout=1000.0)
    )
    fleet.clock.pass_(1000)
    claim = await fleet.claim(running, "gpu")
    assert await expire(fleet.ledger) == 0
    fleet.clock.pass_(1)
    assert await expire(fleet.ledger) == 2
    assert {row["error"] for row in await fleet.rows()} == {
        "it was not done 1000 s (rollout_timeout) after it was accepted"
    }
    assert await fleet.ledger.revoked("gpu", 10) == [claim.samples[0].fence]
    assert await fleet.ledger.claim(waiting, "gpu", 60.0) is None


async def test_who_is_claimed_while_it_expires_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet()
    (ticket,) = await fleet.submit(group(0, [0]), limits=LIMITS)
    look = fleet.ledger.open_rollouts

    async def look_and_claim(run_id: str, limit: int) -> list[OpenRollout]:
        found = await look(run_id, limit)
        await fleet.ledger.claim(ticket, "gpu", 60.0)
        return found

    monkeypatch.setattr(fleet.ledger, "open_rollouts", look_and_claim)
    fleet.clock.pass_(101)
    assert await expire(fleet.ledger) == 0
    assert await fleet.rows() == []


async def test_while_a_run_is_paused_nothing_of_it_expires_and_then_its_time_begins_anew() -> None:
    fleet = Fleet()
    await fleet.submit(group(0), limits=LIMITS)
    await fleet.ledger.set_run_state(RUN, RunState.PAUSED)
    fleet.clock.pass_(100_000)
    assert await expire(fleet.ledger) == 0
    await fleet.ledger.set_run_state(RUN, RunState.OPEN)
    fleet.clock.pass_(100)
    assert await expire(fleet.ledger) == 0
    fleet.clock.pass_(1)
    assert await expire(fleet.ledger) == 2


async def test_g5_only_the_oldest_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet()
    looked: list[int] = []
    look = fleet.ledger.open_rollouts

    async def count(run_id: str, limit: int) -> list[OpenRollout]:
        looked.append(limit)
        return await look(run_id, limit)

    monkeypatch.setattr(fleet.ledger, "open_rollouts", count)
    tickets = await fleet.submit(*(group(index, [0]) for index in range(100)), limits=LIMITS)
    assert await expire(fleet.ledger) == 0
    assert looked == [1]
    fleet.clock.pass_(101)
    for ticket in tickets[:3]:
        await fleet.claim(ticket, "gpu")
    looked.clear()
    assert await expire(fleet.ledger) == 97
    assert looked == [1, 8, 64, 512]
