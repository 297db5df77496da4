"""What every ledger must do: the contract of ``gym_queue.ledger.base`` as examples."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from gym_queue.errors import ConflictError
from gym_queue.ledger.base import Ended, Generated, Retry
from gym_queue.lifecycle import RolloutState
from gym_queue.records import (
    Example,
    Fence,
    Group,
    RunSpec,
    RunState,
    Sampling,
    Stage,
    Summary,
    Ticket,
    Timings,
)
from gym_queue.testing import state_of
from tests.contract.ledgers import leftovers

if TYPE_CHECKING:
    from gym_queue.ledger.base import Ledger

RUN = "run-1"


def spec(**changes: object) -> RunSpec:
    return RunSpec.model_validate({"run_id": RUN, "model": "stub:", "samples": 2} | changes)


def group(index: int, samples: tuple[int, ...] = (0, 1)) -> Group:
    example = Example(id=f"e{index}", environment="rows", row={"prompt": "1+1"}, extra={"level": 3})
    return Group(example_index=index, samples=samples, example=example)


def ended(fence: Fence, state: str = "succeeded") -> Ended:
    row = f"{fence.example_index}.{fence.sample_index}".encode()
    return Ended(summary=summary(fence.example_index, fence.sample_index, state), row=row)


def summary(example_index: int, sample_index: int, state: str = "cancelled") -> Summary:
    return Summary.model_validate(
        {
            "example_index": example_index,
            "sample_index": sample_index,
            "attempt": 1,
            "state": state,
            "timings": Timings(accepted_at=1.0, ended_at=2.0),
        }
    )


CANCELLED = Ended(summary=summary(0, 0), row=b"row")


async def submit(ledger: Ledger, groups: int = 1, **changes: object) -> list[Ticket]:
    await ledger.open_run(spec(**changes), "key-1")
    return await ledger.accept(RUN, 0, groups, [group(index) for index in range(groups)])


async def claimed(ledger: Ledger, ticket: Ticket | None, worker: str = "a") -> list[Fence]:
    assert ticket is not None
    claim = await ledger.claim(ticket, worker, 60)
    assert claim is not None
    return [sample.fence for sample in claim.samples]


async def counters(ledger: Ledger) -> tuple[int, int, int, int]:
    status = await ledger.run(RUN)
    assert status is not None
    return status.accepted, status.succeeded, status.failed, status.cancelled


async def test_a_rollout_travels_through_both_stages(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    assert ticket == Ticket(stage=Stage.GENERATE, run_id=RUN, example_index=0, samples=(0, 1), attempt=1)
    claim = await ledger.claim(ticket, "gpu", 60)
    assert claim is not None
    assert claim.example == group(0).example
    assert [sample.fence.sample_index for sample in claim.samples] == [0, 1]
    assert await state_of(ledger, RUN, 0, 0) is RolloutState.GENERATING

    receipt = await ledger.commit(claim.samples[0].fence, Generated(payload=b"trajectory"))
    assert receipt.accepted
    assert receipt.ticket == Ticket(stage=Stage.VERIFY, run_id=RUN, example_index=0, samples=(0,), attempt=1)
    assert await state_of(ledger, RUN, 0, 0) is RolloutState.VERIFY_QUEUED
    verify = await ledger.claim(receipt.ticket, "cpu", 60)
    assert verify is not None
    assert verify.samples[0].payload == b"trajectory"
    assert (await ledger.commit(verify.samples[0].fence, ended(verify.samples[0].fence))).accepted
    assert await state_of(ledger, RUN, 0, 0) is RolloutState.SUCCEEDED

    assert (await ledger.commit(claim.samples[1].fence, ended(claim.samples[1].fence, "failed"))).accepted
    assert await state_of(ledger, RUN, 0, 1) is None  # the group is gone with its last sample
    assert await counters(ledger) == (2, 1, 1, 0)


@pytest.mark.guarantee("G2")
async def test_g2_only_the_newest_attempt_writes(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    claim = await ledger.claim(ticket, "slow", 60)
    assert claim is not None
    late = claim.samples[0].fence
    receipt = await ledger.commit(late, Retry())
    assert receipt.ticket is not None
    assert receipt.ticket.attempt == 2
    for outcome in (ended(late), Retry(), Generated(payload=b"x")):
        assert not (await ledger.commit(late, outcome)).accepted
    again = await ledger.claim(receipt.ticket, "quick", 60)
    assert again is not None
    assert again.samples[0].failures == 1
    assert not (await ledger.commit(late, ended(late))).accepted
    stolen = again.samples[0].fence.model_copy(update={"worker": "slow"})
    assert not (await ledger.commit(stolen, ended(stolen))).accepted
    assert (await ledger.commit(again.samples[0].fence, ended(again.samples[0].fence))).accepted
    status = await ledger.run(RUN)
    assert status is not None
    assert (status.succeeded, status.refused, status.retried) == (1, 5, 1)


@pytest.mark.guarantee("G1")
async def test_g1_an_ended_rollout_stays_ended(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    claim = await ledger.claim(ticket, "gpu", 60)
    assert claim is not None
    for sample in claim.samples:
        assert (await ledger.commit(sample.fence, ended(sample.fence))).accepted
        assert not (await ledger.commit(sample.fence, ended(sample.fence, "failed"))).accepted
    assert await ledger.claim(ticket, "gpu", 60) is None
    assert await counters(ledger) == (2, 2, 0, 0)
    assert len(await ledger.events(RUN, "", 10, 0)) == 2


async def test_a_ticket_is_good_for_one_claim(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    assert await ledger.claim(ticket, "a", 60) is not None
    assert await ledger.claim(ticket, "b", 60) is None
    assert await ledger.claim(ticket, "a", 60) is None
    stranger = ticket.model_copy(update={"run_id": "no-such-run"})
    assert await ledger.claim(stranger, "a", 60) is None


async def test_a_ticket_grants_what_is_left_of_it(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    assert await ledger.end(RUN, CANCELLED)
    claim = await ledger.claim(ticket, "a", 60)
    assert claim is not None
    assert [sample.fence.sample_index for sample in claim.samples] == [1]


@pytest.mark.guarantee("G2")
async def test_cancelled_stays_cancelled(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    claim = await ledger.claim(ticket, "a", 60)
    assert claim is not None
    assert await ledger.end(RUN, CANCELLED)
    assert not await ledger.end(RUN, CANCELLED)
    assert not (await ledger.commit(claim.samples[0].fence, ended(claim.samples[0].fence))).accepted
    assert await counters(ledger) == (2, 0, 0, 1)
    assert [(one.example_index, one.sample_index) for one in await ledger.open_rollouts(RUN, 10)] == [(0, 1)]


@pytest.mark.guarantee("G8")
async def test_g8_same_key_same_run(ledger: Ledger) -> None:
    first = await ledger.open_run(spec(), "key-1")
    assert await ledger.open_run(spec(run_id="run-2"), "key-1") == first
    with pytest.raises(ConflictError, match="key-1"):
        await ledger.open_run(spec(run_id="run-3", sampling=Sampling(temperature=0.5)), "key-1")
    assert [status.spec.run_id for status in await ledger.runs()] == [RUN]


@pytest.mark.guarantee("G8")
async def test_accepting_twice_accepts_once(ledger: Ledger) -> None:
    tickets = await submit(ledger, groups=2)
    again = await ledger.accept(RUN, 0, 2, [group(0), group(1)])
    assert again == tickets  # the very same call: its answer may have been lost on the way
    assert await ledger.accept(RUN, 1, 3, [group(1), group(2)]) == []
    assert (await counters(ledger))[0] == 4


async def test_a_group_may_ask_for_some_samples_only(ledger: Ledger) -> None:
    await ledger.open_run(spec(), "key-1")
    (ticket,) = await ledger.accept(RUN, 0, 3, [group(2, samples=(1,))])
    assert ticket.samples == (1,)
    status = await ledger.run(RUN)
    assert status is not None
    assert (status.cursor, status.accepted) == (3, 1)


@pytest.mark.parametrize("state", [RunState.PAUSED, RunState.CANCELLED])
async def test_a_run_that_is_not_open_starts_nothing(ledger: Ledger, state: RunState) -> None:
    (ticket,) = await submit(ledger)
    assert await ledger.set_run_state(RUN, state)
    assert await ledger.claim(ticket, "a", 60) is None
    assert await ledger.accept(RUN, 1, 2, [group(1)]) == []
    reopened = await ledger.set_run_state(RUN, RunState.OPEN)
    assert reopened is (state is RunState.PAUSED)
    assert (await ledger.claim(ticket, "a", 60) is not None) is reopened


async def test_events_are_read_again_until_acknowledged(ledger: Ledger) -> None:
    tickets = await submit(ledger, groups=2)
    for ticket in tickets:
        claim = await ledger.claim(ticket, "a", 60)
        assert claim is not None
        for sample in claim.samples:
            await ledger.commit(sample.fence, ended(sample.fence))
    events = await ledger.events(RUN, "", 3, 0)
    assert [event.row for event in events] == [b"0.0", b"0.1", b"1.0"]
    assert events[0].summary == summary(0, 0, "succeeded")
    assert await ledger.events(RUN, "", 3, 0) == events
    assert [event.row for event in await ledger.events(RUN, events[-1].position, 9, 0)] == [b"1.1"]
    assert await ledger.acknowledge(RUN, events[1].position) == 2
    assert await ledger.acknowledge(RUN, events[1].position) == 0
    assert [event.row for event in await ledger.events(RUN, "", 9, 0)] == [b"1.0", b"1.1"]
    status = await ledger.run(RUN)
    assert status is not None
    assert (status.archived, status.open) == (2, 2)


async def test_waiting_for_events_ends_with_the_first(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    claim = await ledger.claim(ticket, "a", 60)
    assert claim is not None
    reader = asyncio.create_task(ledger.events(RUN, "", 10, 30.0))
    await asyncio.sleep(0)
    await ledger.commit(claim.samples[0].fence, ended(claim.samples[0].fence))
    assert len(await reader) == 1
    assert await ledger.events(RUN, (await reader)[0].position, 10, 0.001) == []


async def test_a_delayed_retry_comes_when_it_is_due(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    claim = await ledger.claim(ticket, "a", 60)
    assert claim is not None
    now, later = (sample.fence for sample in claim.samples)
    receipt = await ledger.commit(now, Retry(delay=0.000001, counted=False))
    assert receipt.accepted
    assert receipt.ticket is None
    await ledger.commit(later, Retry(delay=3600))
    due: list[Ticket] = []
    while not due:
        due = await ledger.promote_due(10)
    assert due == [Ticket(stage=Stage.GENERATE, run_id=RUN, example_index=0, samples=(0,), attempt=2)]
    assert await ledger.promote_due(10) == []
    again = await ledger.claim(due[0], "a", 60)
    assert again is not None
    assert again.samples[0].failures == 0


async def test_waiting_tickets_are_those_without_a_claim(ledger: Ledger) -> None:
    tickets = await submit(ledger, groups=3)
    assert await ledger.waiting(Stage.GENERATE, 0, 10) == (3, tickets)
    assert await ledger.waiting(Stage.GENERATE, 0, 2) == (3, tickets[:2])
    assert await ledger.waiting(Stage.GENERATE, 3600, 10) == (3, [])
    assert await ledger.waiting(Stage.VERIFY, 0, 10) == (0, [])
    claim = await ledger.claim(tickets[0], "a", 60)
    assert claim is not None
    assert (await ledger.waiting(Stage.GENERATE, 0, 10))[0] == 2
    receipt = await ledger.commit(claim.samples[0].fence, Generated(payload=b"t"))
    assert await ledger.waiting(Stage.VERIFY, 0, 10) == (1, [receipt.ticket])


async def test_a_worker_owns_what_it_claimed(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    assert not await ledger.heartbeat("a", {"slots": "8"})
    assert await ledger.heartbeat("a", {"slots": "7"})
    (lease,) = await ledger.leases()
    assert (lease.worker, lease.info["slots"]) == ("a", "7")
    claim = await ledger.claim(ticket, "a", 3600)
    assert claim is not None
    assert [owned.fence for owned in await ledger.owned("a", None, 10)] == [s.fence for s in claim.samples]
    assert await ledger.owned("a", 0.0, 10) == []
    assert await ledger.owned("b", None, 10) == []
    await ledger.drop_lease("a")
    assert len(await ledger.leases()) == 1  # it owns something
    await ledger.end(RUN, CANCELLED)
    await ledger.commit(claim.samples[1].fence, ended(claim.samples[1].fence))
    assert await ledger.owned("a", None, 10) == []
    await ledger.drop_lease("a")
    assert await ledger.leases() == []


async def test_overdue_attempts_are_found(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    assert await ledger.claim(ticket, "a", 0.0)
    overdue = await ledger.owned("a", 0.0, 10)
    assert all(attempt.seen_at >= attempt.accepted_at for attempt in overdue)
    assert [attempt.fence.sample_index for attempt in overdue] == [0, 1]
    assert overdue[0].example == group(0).example


async def test_a_forgotten_run_leaves_nothing(ledger: Ledger) -> None:
    await submit(ledger, groups=3)
    await ledger.forget_run(RUN)
    assert await ledger.run(RUN) is None
    assert await ledger.runs() == []
    assert (await ledger.waiting(Stage.GENERATE, 0, 10))[0] == 0
    assert await leftovers(ledger) == []
    await submit(ledger)  # the key may be used again
    assert (await counters(ledger))[0] == 2


@pytest.mark.guarantee("G2")
async def test_a_worker_cannot_write_its_own_old_attempt(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    old, other = await claimed(ledger, ticket)
    again = await ledger.commit(old, Retry(counted=False))
    assert await ledger.claim(ticket, "a", 60) is None  # the ticket of the old attempt, delivered twice
    (new,) = await claimed(ledger, again.ticket)
    assert (new.worker, new.attempt) == (old.worker, 2)
    assert not (await ledger.commit(old, ended(old))).accepted
    verify = await ledger.commit(other, Generated(payload=b"t"))
    (judged,) = await claimed(ledger, verify.ticket)
    assert (judged.worker, judged.attempt) == (other.worker, other.attempt)
    assert not (await ledger.commit(other, ended(other))).accepted  # its stage is over
    assert await counters(ledger) == (2, 0, 0, 0)


async def test_the_second_stage_counts_its_own_failures_and_keeps_the_trajectory(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    fence, _ = await claimed(ledger, ticket)
    again = await ledger.commit(fence, Retry())
    (fence,) = await claimed(ledger, again.ticket)
    verify = await ledger.commit(fence, Generated(payload=b"trajectory"))
    for failures in (0, 1):
        assert verify.ticket is not None
        assert await ledger.waiting(Stage.VERIFY, 0, 10) == (1, [verify.ticket])
        claim = await ledger.claim(verify.ticket, "a", 60)
        assert claim is not None
        assert [(sample.failures, sample.payload) for sample in claim.samples] == [(failures, b"trajectory")]
        owned = [
            attempt for attempt in await ledger.owned("a", None, 10) if attempt.fence.stage is Stage.VERIFY
        ]
        assert [(attempt.failures, attempt.payload) for attempt in owned] == [(failures, b"trajectory")]
        verify = await ledger.commit(claim.samples[0].fence, Retry())


async def test_a_delayed_retry_of_the_second_stage_comes_back_to_it(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    fence, _ = await claimed(ledger, ticket)
    verify = await ledger.commit(fence, Generated(payload=b"t"))
    (fence,) = await claimed(ledger, verify.ticket)
    await ledger.commit(fence, Retry(delay=0.000001))
    due: list[Ticket] = []
    while not due:
        due = await ledger.promote_due(10)
    assert [(ticket.stage, ticket.attempt) for ticket in due] == [(Stage.VERIFY, 2)]
    assert await ledger.waiting(Stage.VERIFY, 0, 10) == (1, due)


async def test_a_paused_run_still_verifies(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    fence, _ = await claimed(ledger, ticket)
    verify = await ledger.commit(fence, Generated(payload=b"t"))
    await ledger.set_run_state(RUN, RunState.PAUSED)
    (fence,) = await claimed(ledger, verify.ticket)
    assert (await ledger.commit(fence, ended(fence))).accepted


async def test_tickets_of_a_paused_run_go_behind_others(ledger: Ledger) -> None:
    tickets = await submit(ledger, groups=3)
    await ledger.set_run_state(RUN, RunState.PAUSED)
    assert await ledger.claim(tickets[0], "a", 60) is None
    assert await ledger.waiting(Stage.GENERATE, 0, 10) == (3, [*tickets[1:], tickets[0]])


async def test_who_claims_without_a_lease_gets_one(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    await claimed(ledger, ticket)
    assert [lease.worker for lease in await ledger.leases()] == ["a"]
    assert await ledger.heartbeat("a", {"slots": "8"})
    assert [lease.info["slots"] for lease in await ledger.leases()] == ["8"]


@pytest.mark.guarantee("G8")
async def test_a_run_that_stands_is_not_taken_by_another_key(ledger: Ledger) -> None:
    await submit(ledger)
    for other in (spec(), spec(samples=7)):
        with pytest.raises(ConflictError, match="another idempotency key"):
            await ledger.open_run(other, "key-2")
    assert (await counters(ledger))[0] == 2
    await ledger.open_run(spec(run_id="run-2"), "key-2")
    assert {status.spec.run_id for status in await ledger.runs()} == {RUN, "run-2"}
