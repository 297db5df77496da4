"""The sweep: the work of dead workers goes back (G3), lost tickets come again (G4), poison ends (G6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gym_queue.ledger.base import Ended, Retry
from gym_queue.lifecycle import RolloutState
from gym_queue.records import Limits, RunState, Stage
from gym_queue.testing import state_of
from tests.contract.ledger_model import summary
from tests.unit.road import RUN, World, group
from tests.unit.silent_fleet import GRACE, LEASE, TIMEOUT, Fleet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.records import Ticket

# --- reap -------------------------------------------------------------------------------------------------


@pytest.mark.guarantee("G3")
async def test_g3_what_a_silent_worker_owns_is_queued_again() -> None:
    fleet = Fleet()
    one, two = await fleet.submit(group(0), group(1))
    await fleet.claim(one, "dead")
    fleet.clock.pass_(TIMEOUT + 1)
    claim = await fleet.claim(two, "alive")
    assert await fleet.reap() == 2
    assert [(ticket.samples, ticket.attempt) for ticket in fleet.publisher.tickets] == [((0,), 2), ((1,), 2)]
    assert await fleet.workers() == {"alive"}
    assert await fleet.ledger.owned("alive", None, 10) != []
    assert [sample.fence.attempt for sample in claim.samples] == [1, 1]
    assert await fleet.reap() == 0
    await fleet.work(*fleet.publisher.take())
    assert [row["attempt"] for row in await fleet.rows()] == [2, 2]


async def test_a_worker_within_its_time_is_left_alone() -> None:
    fleet = Fleet()
    (ticket,) = await fleet.submit(group(0))
    await fleet.claim(ticket, "alive")
    fleet.clock.pass_(LEASE)
    assert await fleet.reap() == 0
    assert await fleet.workers() == {"alive"}
    assert fleet.publisher.tickets == []


async def test_g2_who_comes_back_from_the_dead_changes_nothing() -> None:
    fleet = Fleet()
    (ticket,) = await fleet.submit(group(0, [0]))
    claim = await fleet.claim(ticket, "dead")
    fleet.clock.pass_(TIMEOUT + 1)
    await fleet.reap()
    assert not (await fleet.ledger.commit(claim.samples[0].fence, Retry())).accepted
    assert await state_of(fleet.ledger, RUN, 0, 0) is RolloutState.QUEUED


async def test_who_was_given_up_and_claims_before_its_next_heartbeat_is_watched_again() -> None:
    fleet = Fleet()
    one, two = await fleet.submit(group(0), group(1))
    await fleet.claim(one, "sleeper")
    fleet.clock.pass_(TIMEOUT + 1)
    await fleet.reap()
    assert await fleet.workers() == set()
    assert await fleet.ledger.claim(two, "sleeper", LEASE)  # it wakes, pulls a ticket, and dies for good
    fleet.clock.pass_(TIMEOUT + 1)
    assert await fleet.reap() == 2


@pytest.mark.guarantee("G7")
async def test_an_attempt_past_its_deadline_ends_as_timeout_while_its_worker_lives() -> None:
    fleet = Fleet()
    (ticket,) = await fleet.submit(group(0, [0]))
    await fleet.claim(ticket, "stuck")
    fleet.clock.pass_(LEASE + 4)
    assert await fleet.reap() == 0  # the worker itself ends the stage first
    fleet.clock.pass_(2)
    assert await fleet.reap() == 0  # it may stand still: nobody knows that it lives
    await fleet.ledger.heartbeat("stuck", {})
    assert await fleet.reap() == 1
    (row,) = await fleet.rows()
    assert (row["state"], row["class"], row["stage"]) == ("failed", "timeout", "generate")
    assert row["error"] == "worker stuck ran past the stage's deadline"
    assert await fleet.workers() == {"stuck"}
    assert len(await fleet.ledger.revoked("stuck", 10)) == 1


async def deaths(fleet: Fleet, tickets: Sequence[Ticket], times: int) -> list[Ticket]:
    """Let workers claim these tickets and die, one after the other; return what is queued after the last."""
    for number in range(times):
        for ticket in tickets:
            await fleet.claim(ticket, f"victim-{number + 1}")
        fleet.clock.pass_(TIMEOUT + 1)
        assert await fleet.reap() == sum(len(ticket.samples) for ticket in tickets)
        tickets = fleet.publisher.take()
    return list(tickets)


async def test_g6_a_rollout_that_kills_its_workers_is_failed_with_what_is_known() -> None:
    fleet = Fleet()
    tickets = await fleet.submit(group(0, [0]), limits=Limits(max_attempts=3))
    tickets = await deaths(fleet, tickets, 2)
    assert [(ticket.attempt, ticket.losses) for ticket in tickets] == [(3, 2)]
    assert await fleet.rows() == []
    assert await deaths(fleet, tickets, 1) == []
    (row,) = await fleet.rows()
    assert (row["state"], row["class"], row["attempt"]) == ("failed", "infrastructure", 3)
    assert (
        row["error"] == "3 workers died with this rollout; the last one: worker victim-1 was silent for 301 s"
    )
    assert await fleet.workers() == set()
    status = await fleet.ledger.run(RUN)
    assert status is not None
    assert (status.lost, status.retried) == (2, 0)


async def test_g6_nobody_is_failed_for_a_death_that_others_may_have_caused() -> None:
    fleet = Fleet()
    tickets = await fleet.submit(group(0, [0, 1]), limits=Limits(max_attempts=3))
    tickets = await deaths(fleet, tickets, 5)
    assert [(ticket.attempt, ticket.losses) for ticket in tickets] == [(6, 5), (6, 5)]
    assert await fleet.rows() == []
    assert await deaths(fleet, tickets, 1) == []  # workers that know no quarantine cannot go on for ever
    assert [row["class"] for row in await fleet.rows()] == ["infrastructure"] * 2


async def test_who_dies_with_more_than_one_batch_is_not_alone_with_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gym_queue.maintenance.reap._BATCH", 2)
    fleet = Fleet()
    tickets = await fleet.submit(group(0, [0, 1, 2]), limits=Limits(max_attempts=3))
    assert len(await deaths(fleet, tickets, 3)) == 3


async def test_deaths_leave_other_failures_their_attempts() -> None:
    fleet = Fleet()
    tickets = await fleet.submit(group(0, [0]), limits=Limits(max_attempts=3))
    (ticket,) = await deaths(fleet, tickets, 2)
    claim = await fleet.claim(ticket, "gpu")
    assert claim.samples[0].failures == 0


async def test_a_worker_that_was_given_up_is_told_what_it_lost() -> None:
    fleet = Fleet()
    (ticket,) = await fleet.submit(group(0))
    claim = await fleet.claim(ticket, "sleeper")
    fleet.clock.pass_(TIMEOUT + 1)
    await fleet.reap()
    assert await fleet.ledger.revoked("sleeper", 10) == [sample.fence for sample in claim.samples]


async def test_a_broker_that_is_away_holds_up_no_reaping() -> None:
    fleet = Fleet()
    fleet.publisher.away = True
    one, two = await fleet.submit(group(0), group(1))
    await fleet.claim(one, "dead")
    await fleet.claim(two, "gone")
    fleet.clock.pass_(TIMEOUT + 1)
    assert await fleet.reap() == 4
    fleet.publisher.away = False
    fleet.clock.pass_(GRACE)
    assert len(await fleet.audit()) == 4


async def test_a_verification_that_dies_for_good_keeps_its_trajectory() -> None:
    fleet = Fleet(World(inline=False))
    (ticket,) = await fleet.submit(group(0, [0]), limits=Limits(max_attempts=1))
    await fleet.pipeline.generate(ticket)
    (verify,) = fleet.publisher.take()
    await fleet.claim(verify, "cpu")
    fleet.clock.pass_(TIMEOUT + 1)
    await fleet.reap()
    (row,) = await fleet.rows()
    assert (row["class"], row["stage"]) == ("infrastructure", "verify")
    assert row["messages"][-1]["content"] == "ok"
    assert row["timings"]["generate"] >= 0


async def test_times_in_the_last_words_are_on_the_ledgers_clock() -> None:
    fleet = Fleet()
    (ticket,) = await fleet.submit(group(0, [0]))
    await fleet.claim(ticket, "stuck")
    fleet.clock.pass_(100)
    await fleet.ledger.heartbeat("stuck", {})
    await fleet.reap()
    (row,) = await fleet.rows()
    assert row["timings"]["ended_at"] - row["timings"]["accepted_at"] == 100


async def test_claims_on_what_was_cancelled_do_not_keep_a_lease() -> None:
    fleet = Fleet()
    (ticket,) = await fleet.submit(group(0, [0]))
    claim = await fleet.claim(ticket, "dead")
    assert await fleet.ledger.end(RUN, Ended(summary=summary((0, 0), "cancelled"), row=b"{}"))
    fleet.clock.pass_(TIMEOUT + 1)
    assert await fleet.reap() == 0
    assert await fleet.workers() == set()
    assert not (await fleet.ledger.commit(claim.samples[0].fence, Retry())).accepted


# --- audit ------------------------------------------------------------------------------------------------


@pytest.mark.guarantee("G4")
async def test_g4_lost_tickets_come_again_as_many_as_are_missing_the_oldest_first() -> None:
    fleet = Fleet()
    tickets = await fleet.submit(*(group(index) for index in range(5)))
    fleet.clock.pass_(GRACE + 1)
    fleet.broker.depths[Stage.GENERATE] = 3
    assert await fleet.audit() == tickets[:2]
    fleet.broker.depths[Stage.GENERATE] = 5
    assert await fleet.audit() == []
    status = await fleet.ledger.run(RUN)
    assert status is not None
    assert status.republished == 2


async def test_g4_a_broker_that_is_away_holds_up_no_audit(caplog: pytest.LogCaptureFixture) -> None:
    fleet = Fleet(World(inline=False))
    one, two, _ = await fleet.submit(*(group(index, [0]) for index in range(3)))
    await fleet.pipeline.generate(one)
    (verify,) = fleet.publisher.take()
    claim = await fleet.claim(two, "gpu")
    await fleet.ledger.commit(claim.samples[0].fence, Retry(delay=1.0))
    fleet.clock.pass_(GRACE)
    fleet.publisher.away = True
    assert await fleet.audit() == []
    assert "tickets are left to the next audit" in caplog.text
    fleet.publisher.away = False
    fleet.broker.away = {Stage.GENERATE}
    assert await fleet.audit() == [verify]
    assert "the generate queue was not audited" in caplog.text
    fleet.broker.away = set()
    fleet.clock.pass_(GRACE)
    assert {ticket.example_index for ticket in await fleet.audit()} == {0, 1, 2}
    status = await fleet.ledger.run(RUN)
    assert status is not None
    assert status.republished == 4


async def test_tickets_on_their_way_to_the_broker_are_given_time() -> None:
    fleet = Fleet()
    tickets = await fleet.submit(group(0))
    assert await fleet.audit() == []
    fleet.clock.pass_(GRACE)
    assert await fleet.audit() == tickets


async def test_each_stage_is_compared_with_its_own_queue() -> None:
    fleet = Fleet(World(inline=False))
    one, two = await fleet.submit(group(0, [0]), group(1, [0]))
    await fleet.pipeline.generate(one)
    (verify,) = fleet.publisher.take()
    fleet.clock.pass_(GRACE)
    fleet.broker.depths[Stage.GENERATE] = 9
    assert await fleet.audit() == [verify]
    fleet.broker.depths = {Stage.GENERATE: 0, Stage.VERIFY: 1}
    assert await fleet.audit() == [two]


async def test_what_the_audit_publishes_can_be_worked_off() -> None:
    fleet = Fleet()
    await fleet.submit(*(group(index) for index in range(3)))  # and all tickets are lost
    fleet.clock.pass_(GRACE)
    await fleet.work(*await fleet.audit(), *await fleet.audit())
    assert len(await fleet.rows()) == 6
    assert await fleet.audit() == []


async def test_retries_are_published_when_their_delay_is_over() -> None:
    fleet = Fleet()
    (ticket,) = await fleet.submit(group(0, [0]))
    claim = await fleet.claim(ticket, "gpu")
    await fleet.ledger.commit(claim.samples[0].fence, Retry(delay=30.0))
    fleet.clock.pass_(29)
    assert await fleet.audit() == []
    fleet.clock.pass_(1)
    (retry,) = await fleet.audit()
    assert retry.attempt == 2
    await fleet.work(retry)
    assert len(await fleet.rows()) == 1


async def test_more_retries_than_one_batch_are_all_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_queue.maintenance.audit._BATCH", 2)
    fleet = Fleet()
    for ticket in await fleet.submit(*(group(index, [0]) for index in range(5))):
        claim = await fleet.claim(ticket, "gpu")
        await fleet.ledger.commit(claim.samples[0].fence, Retry(delay=1.0))
    fleet.clock.pass_(1)
    assert len(await fleet.audit()) == 5


async def test_a_paused_run_is_harmless_and_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tickets are published in vain; those of another run that are lost come again all the same."""
    monkeypatch.setattr("gym_queue.maintenance.audit._BATCH", 2)
    fleet = Fleet()
    await fleet.submit(*(group(index) for index in range(4)))
    await fleet.ledger.set_run_state(RUN, RunState.PAUSED)
    fleet.clock.pass_(1)
    other = (await fleet.ledger.run(RUN)).spec.model_copy(update={"run_id": "other"})  # type: ignore[union-attr]
    await fleet.ledger.open_run(other, "other")
    lost = await fleet.ledger.accept("other", 0, 1, [group(0)])
    published: list[Ticket] = []
    for _ in range(3):
        fleet.clock.pass_(GRACE)
        again = await fleet.audit()
        published += again
        await fleet.work(*again)
    assert lost[0] in published
    assert await fleet.events() == []
    assert len(await fleet.ledger.events("other", "", 10, 0)) == 2
    await fleet.ledger.set_run_state(RUN, RunState.OPEN)
    for _ in range(2):
        fleet.clock.pass_(GRACE)
        await fleet.work(*await fleet.audit())
    assert len(await fleet.rows()) == 8
