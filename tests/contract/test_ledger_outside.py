"""What every ledger must do for those who look on or step in: ends from outside, deaths, whereabouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gym_queue.ledger.base import LONGEST_REASON, Ended, Generated, Retry
from gym_queue.ledger.redis import RedisLedger
from gym_queue.lifecycle import RolloutState
from gym_queue.records import RunState, Stage, Ticket
from tests.contract.ledgers import leftovers, unwrapped
from tests.contract.test_ledger import RUN, claimed, counters, ended, group, spec, submit, summary

if TYPE_CHECKING:
    from gym_queue.ledger.base import Ledger, Outcome

# --- from outside -----------------------------------------------------------------------------------------


async def test_an_end_from_outside_is_told_to_the_owner(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    one, other = await claimed(ledger, ticket)
    assert await ledger.end(RUN, ended(one, "failed"))
    assert [attempt.fence for attempt in await ledger.owned("a", None, 10)] == [other]
    assert await ledger.revoked("b", 10) == []
    assert await ledger.revoked("a", 10) == [one]
    assert await ledger.revoked("a", 10) == []  # told once
    assert [event.row for event in await ledger.events(RUN, "", 10, 0)] == [b"0.0"]
    assert await counters(ledger) == (2, 0, 1, 0)


async def test_who_writes_in_the_owners_stead_lets_it_know(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    one, other = await claimed(ledger, ticket)
    assert (await ledger.commit(one, Retry(), revoke=True)).accepted
    assert not (await ledger.commit(one, Retry(), revoke=True)).accepted  # refused: nothing was taken
    assert (await ledger.commit(other, Retry())).accepted
    assert await ledger.revoked("a", 10) == [one]


async def test_what_was_revoked_is_told_in_order_and_in_parts(ledger: Ledger) -> None:
    tickets = await submit(ledger, groups=2)
    fences = [fence for ticket in tickets for fence in await claimed(ledger, ticket)]
    for fence in fences:
        await ledger.commit(fence, ended(fence), revoke=True)
    assert await ledger.revoked("a", 3) == fences[:3]
    assert await ledger.revoked("a", 3) == fences[3:]


async def test_what_waits_can_be_ended_only_as_the_attempt_that_was_seen(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    failed = Ended(summary=summary(0, 0, "failed"), row=b"row")
    assert not await ledger.end(RUN, failed, waiting_attempt=2)
    one, other = await claimed(ledger, ticket)
    assert not await ledger.end(RUN, failed, waiting_attempt=1)  # a worker has it by now
    await ledger.commit(one, Retry())
    assert not await ledger.end(RUN, failed, waiting_attempt=1)
    assert await ledger.end(RUN, failed, waiting_attempt=2)
    verify = await ledger.commit(other, Generated(payload=b"t"))
    assert await ledger.end(RUN, ended(other, "cancelled"), waiting_attempt=1)
    assert verify.ticket is not None
    assert await ledger.claim(verify.ticket, "a", 60) is None
    assert await ledger.revoked("a", 10) == []  # nobody owned them
    status = await ledger.run(RUN)
    assert status is not None
    assert (status.failed, status.cancelled, status.queued, status.in_flight) == (1, 1, 0, 0)


async def test_a_ticket_carries_the_deaths_of_its_workers(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    fence, _ = await claimed(ledger, ticket)
    for losses in (1, 2):
        receipt = await ledger.commit(fence, Retry(lost=True, counted=False))
        assert receipt.ticket is not None
        assert receipt.ticket.losses == losses
        assert receipt.ticket in (await ledger.waiting(Stage.GENERATE, 0, 10))[1]
        (fence,) = await claimed(ledger, receipt.ticket)
        assert fence.losses == losses
        assert fence in [attempt.fence for attempt in await ledger.owned("a", None, 10)]
    status = await ledger.run(RUN)
    assert status is not None
    assert (status.lost, status.retried) == (2, 0)
    again = await ledger.commit(fence, Retry())
    assert again.ticket is not None
    assert again.ticket.losses == 2  # a failure of another kind forgets no death
    (fence,) = await claimed(ledger, again.ticket)
    assert await ledger.end(RUN, ended(fence))
    assert await ledger.revoked("a", 10) == [fence]
    assert fence not in [attempt.fence for attempt in await ledger.owned("a", None, 10)]


async def test_the_second_stage_counts_its_own_deaths(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    fence, _ = await claimed(ledger, ticket)
    (fence,) = await claimed(ledger, (await ledger.commit(fence, Retry(lost=True))).ticket)
    verify = await ledger.commit(fence, Generated(payload=b"t"))
    assert verify.ticket is not None
    assert verify.ticket.losses == 0


async def test_a_delayed_ticket_keeps_its_losses(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    fence, _ = await claimed(ledger, ticket)
    await ledger.commit(fence, Retry(delay=0.000001, lost=True))
    due: list[Ticket] = []
    while not due:
        due = await ledger.promote_due(10)
    assert [ticket.losses for ticket in due] == [1]


async def test_tickets_that_nobody_waits_for_are_counted(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    await ledger.set_run_state(RUN, RunState.PAUSED)
    assert await ledger.claim(ticket, "a", 60) is None  # it waits on
    await ledger.set_run_state(RUN, RunState.OPEN)
    await claimed(ledger, ticket)
    assert await ledger.claim(ticket, "a", 60) is None
    await ledger.set_run_state(RUN, RunState.CANCELLED)
    assert await ledger.claim(ticket.model_copy(update={"attempt": 2}), "a", 60) is None
    status = await ledger.run(RUN)
    assert status is not None
    assert status.dropped == 2


async def test_republished_tickets_are_counted_for_a_run_that_is_known(ledger: Ledger) -> None:
    await submit(ledger)
    await ledger.count_republished(RUN, 2)
    await ledger.count_republished(RUN, 1)
    await ledger.count_republished("forgotten", 5)
    status = await ledger.run(RUN)
    assert status is not None
    assert status.republished == 3
    assert await ledger.run("forgotten") is None


# --- where a rollout is -----------------------------------------------------------------------------------


async def test_open_rollouts_are_shown_as_they_stand_the_oldest_groups_first(ledger: Ledger) -> None:
    await ledger.open_run(spec(), "key-1")
    tickets = []
    for index in (9, 10, 11):  # in a text, 10 comes before 9
        tickets += await ledger.accept(RUN, 0 if index == 9 else index, index + 1, [group(index)])
    one, _ = await claimed(ledger, tickets[0])
    await ledger.commit(one, Retry())
    _, other = await claimed(ledger, tickets[1])
    await ledger.commit(other, ended(other))
    shown = await ledger.open_rollouts(RUN, 10)
    assert [(s.example_index, s.sample_index, s.state, s.attempt) for s in shown] == [
        (9, 0, RolloutState.QUEUED, 2),
        (9, 1, RolloutState.GENERATING, 1),
        (10, 0, RolloutState.GENERATING, 1),
        (11, 0, RolloutState.QUEUED, 1),
        (11, 1, RolloutState.QUEUED, 1),
    ]
    assert shown[0].example == group(9).example
    assert shown[0].accepted_at < shown[0].since <= shown[0].seen_at
    assert shown[4].since == shown[4].accepted_at
    fewer = await ledger.open_rollouts(RUN, 3)
    assert [(s.example_index, s.sample_index) for s in fewer] == [(9, 0), (9, 1), (10, 0)]
    assert await ledger.open_rollouts("no-such-run", 10) == []
    some = await ledger.open_rollouts(RUN, 10, [11, 9])
    assert [(s.example_index, s.sample_index) for s in some] == [(9, 0), (9, 1), (11, 0), (11, 1)]
    assert await ledger.open_rollouts(RUN, 10, [8, 12]) == []
    assert await ledger.open_rollouts(RUN, 10, []) == []
    assert len(await ledger.open_rollouts(RUN, 1, [9])) == 1


async def test_whereabouts_of_a_rollout_that_waits(ledger: Ledger) -> None:
    tickets = await submit(ledger, groups=1)
    tickets += await ledger.accept(RUN, 1, 2, [group(1)])
    first = await ledger.whereabouts(RUN, 0, 0)
    assert first is not None
    assert (first.state, first.attempt, first.failures) == (RolloutState.QUEUED, 1, 0)
    assert (first.worker, first.deadline, first.ahead, first.reason) == ("", None, 0, "")
    assert first.accepted_at == first.since <= first.seen_at
    second = await ledger.whereabouts(RUN, 1, 0)
    assert second is not None
    assert second.ahead == 1  # tickets, not rollouts
    await claimed(ledger, tickets[0])
    second = await ledger.whereabouts(RUN, 1, 0)
    assert second is not None
    assert second.ahead == 0


async def test_whereabouts_of_a_rollout_that_runs(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    fence, _ = await claimed(ledger, ticket)
    (fence,) = await claimed(ledger, (await ledger.commit(fence, Retry(lost=True))).ticket, worker="gpu-1")
    found = await ledger.whereabouts(RUN, 0, 0)
    assert found is not None
    assert (found.state, found.attempt, found.failures) == (RolloutState.GENERATING, 2, 1)
    assert found.worker == "gpu-1"
    assert found.deadline is not None
    assert 50 < found.deadline - found.seen_at <= 60
    assert found.since > found.accepted_at


async def test_whereabouts_of_a_delayed_retry(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    fence, other = await claimed(ledger, ticket)
    await ledger.commit(other, Retry())
    await ledger.commit(fence, Retry(delay=100.0, reason="x" * 1000))
    found = await ledger.whereabouts(RUN, 0, 0)
    assert found is not None
    assert found.state is RolloutState.QUEUED
    assert 90 < found.since - found.seen_at <= 100  # when it will be due
    assert found.ahead == 1
    assert found.reason == "x" * LONGEST_REASON


async def test_the_reason_is_that_of_the_last_attempt(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    fence, other = await claimed(ledger, ticket)

    async def reason() -> str | None:
        found = await ledger.whereabouts(RUN, 0, 0)
        return found.reason if found else None

    for said in ("the engine — \ud83d — went away", "", "again"):
        receipt = await ledger.commit(fence, Retry(reason=said))
        assert await reason() == said.replace("\ud83d", "?")
        (fence,) = await claimed(ledger, receipt.ticket)
        assert await reason() == said.replace("\ud83d", "?")
    await ledger.commit(fence, Generated(payload=b"t"))
    assert await reason() == ""
    await ledger.end(RUN, ended(fence))
    assert await reason() == ""
    await ledger.end(RUN, ended(other))
    assert await reason() is None


async def test_an_ended_rollout_is_where_it_ended_while_its_group_goes_on(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    fence, other = await claimed(ledger, ticket)
    await ledger.commit(fence, Retry(reason="once"))
    await ledger.end(RUN, ended(fence, "failed"))
    found = await ledger.whereabouts(RUN, 0, 0)
    assert found is not None
    assert (found.state, found.attempt, found.worker, found.reason) == (RolloutState.FAILED, 0, "", "")
    assert found.since == found.accepted_at
    await ledger.commit(other, ended(other))
    assert await ledger.whereabouts(RUN, 0, 0) is None
    assert await ledger.whereabouts("no-such-run", 0, 0) is None


# --- forgetting -------------------------------------------------------------------------------------------


async def test_a_forgotten_run_has_no_retries_due_and_no_events(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    one, other = await claimed(ledger, ticket)
    await ledger.commit(one, Retry(delay=0.000001))
    await ledger.commit(other, ended(other))
    position = (await ledger.events(RUN, "", 1, 0))[0].position
    await ledger.forget_run(RUN)
    await ledger.forget_run(RUN)
    assert await ledger.promote_due(10) == []
    assert await ledger.events(RUN, "", 10, 0) == []
    assert await ledger.acknowledge(RUN, position) == 0
    assert not (await ledger.commit(one, ended(one))).accepted


@pytest.mark.parametrize("state", RunState)
async def test_nothing_stays_of_a_forgotten_run_whatever_it_was_doing(
    ledger: Ledger, state: RunState
) -> None:
    tickets = await submit(ledger, groups=5)
    running = await claimed(ledger, tickets[0])
    outcomes: list[Outcome] = [Retry(reason="once"), Retry(delay=3600), Generated(payload=b"t")]
    for ticket, outcome in zip(tickets[1:4], outcomes, strict=True):
        one, other = await claimed(ledger, ticket)
        await ledger.commit(one, outcome)
        await ledger.commit(other, ended(other))
    await ledger.set_run_state(RUN, state)
    await ledger.forget_run(RUN)
    assert await ledger.open_rollouts(RUN, 10) == []
    assert await ledger.events(RUN, "", 10, 0) == []
    for stage in Stage:
        assert await ledger.waiting(stage, 0, 10) == (0, [])
    assert not await ledger.end(RUN, ended(running[0]))
    assert await ledger.acknowledge(RUN, "1-0" if isinstance(unwrapped(ledger), RedisLedger) else "1") == 0
    assert await ledger.claim(tickets[4], "a", 60) is None
    assert not (await ledger.commit(running[0], ended(running[0]))).accepted
    assert await ledger.owned("a", None, 10) == []  # the claim on the other one is dropped here
    await ledger.drop_lease("a")
    assert await ledger.leases() == []
    assert await leftovers(ledger) == []


async def test_to_open_a_run_again_starts_its_rollouts_time_anew(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    before = await ledger.run(RUN)
    assert before is not None
    (rollout, *_) = await ledger.open_rollouts(RUN, 10)
    assert before.opened_at <= rollout.accepted_at
    await ledger.set_run_state(RUN, RunState.PAUSED)
    paused = await ledger.run(RUN)
    assert paused is not None
    assert paused.opened_at == before.opened_at
    await ledger.set_run_state(RUN, RunState.OPEN)
    after = await ledger.run(RUN)
    assert after is not None
    assert after.opened_at > rollout.accepted_at
    claim = await ledger.claim(ticket, "a", 60)
    assert claim is not None
    assert claim.opened_at == after.opened_at


async def test_a_worker_can_read_what_it_is_said_to_own(ledger: Ledger) -> None:
    first, second = await submit(ledger, 2)
    fences = [*await claimed(ledger, first), *await claimed(ledger, second)]
    await claimed(ledger, (await ledger.commit(fences[0], Retry())).ticket, "b")
    assert sorted(await ledger.claimed("a", 10), key=repr) == sorted(fences[1:], key=repr)
    assert len(await ledger.claimed("a", 2)) == 2
    assert await ledger.claimed("nobody", 10) == []
