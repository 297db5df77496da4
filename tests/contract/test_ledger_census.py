"""What every ledger must count over all runs, and go on counting when it forgets them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gym_queue.ledger.base import Ended, Generated, Retry
from gym_queue.records import FailureClass, RunState, Stage, Summary, Timings, Usage
from tests.contract.test_ledger import RUN, claimed, spec, submit

if TYPE_CHECKING:
    from gym_queue.census import Census
    from gym_queue.ledger.base import Ledger
    from gym_queue.records import Fence


def ended(fence: Fence, failure: FailureClass | None = None, tokens: int = 0) -> Ended:
    summary = Summary(
        example_index=fence.example_index,
        sample_index=fence.sample_index,
        attempt=fence.attempt,
        state="failed" if failure else "succeeded",
        failure_class=failure,
        usage=Usage(prompt_tokens=tokens, completion_tokens=2 * tokens),
        timings=Timings(accepted_at=1.0, ended_at=2.0),
    )
    return Ended(summary=summary, row=b"row")


def counted(census: Census) -> dict[str, int]:
    """Return the totals that are not 0."""
    values = {name: value for name, value in census.totals if name != "failures"}
    return {name: value for name, value in values.items() if value}


async def test_an_empty_ledger_counts_nothing(ledger: Ledger) -> None:
    census = await ledger.census()
    assert counted(census) == {}
    assert (census.runs, census.queued, census.in_flight, census.unarchived) == ({}, 0, 0, 0)
    assert {stage: line.tickets for stage, line in census.waiting.items()} == dict.fromkeys(Stage, 0)
    assert {line.oldest for line in census.waiting.values()} == {0.0}


async def test_rollouts_are_counted_where_they_stand(ledger: Ledger) -> None:
    tickets = await submit(ledger, groups=3)  # of two samples each
    census = await ledger.census()
    assert (census.queued, census.in_flight, census.runs) == (6, 0, {RunState.OPEN: 1})
    assert census.waiting[Stage.GENERATE].tickets == 3
    one, other = await claimed(ledger, tickets[0])
    await ledger.commit(one, Generated(payload=b"trajectory"))
    await ledger.commit(other, Retry(delay=60.0))
    census = await ledger.census()
    assert (census.queued, census.in_flight, census.unarchived, census.delayed) == (5, 1, 0, 1)
    assert {stage: line.tickets for stage, line in census.waiting.items()} == {
        Stage.GENERATE: 2,
        Stage.VERIFY: 1,
    }


async def test_the_oldest_ticket_of_a_line_has_an_age(ledger: Ledger) -> None:
    await submit(ledger, groups=1)
    first = (await ledger.census()).waiting[Stage.GENERATE].oldest
    while (later := (await ledger.census()).waiting[Stage.GENERATE].oldest) <= first:
        pass
    assert 0.0 <= first < later < 60.0


async def test_what_ended_is_counted_by_state_class_and_tokens(ledger: Ledger) -> None:
    tickets = await submit(ledger, groups=2)
    (one, two), (three, four) = [await claimed(ledger, ticket) for ticket in tickets]
    await ledger.commit(one, ended(one, tokens=10))
    await ledger.commit(two, ended(two, FailureClass.TIMEOUT))
    await ledger.commit(three, ended(three, FailureClass.MODEL, tokens=1))
    await ledger.end(RUN, ended(four, FailureClass.TIMEOUT))
    await ledger.commit(four, ended(four))  # too late
    census = await ledger.census()
    assert counted(census) == {
        "accepted": 4,
        "succeeded": 1,
        "failed": 3,
        "refused": 1,
        "prompt_tokens": 11,
        "completion_tokens": 22,
    }
    assert census.totals.failures == {FailureClass.TIMEOUT: 2, FailureClass.MODEL: 1}
    assert (census.queued, census.in_flight, census.unarchived) == (0, 0, 4)


async def test_a_commit_that_is_written_twice_counts_once(ledger: Ledger) -> None:
    (ticket,) = await submit(ledger)
    one, _ = await claimed(ledger, ticket)
    await ledger.commit(one, ended(one, FailureClass.MODEL, tokens=3))
    assert not (await ledger.commit(one, ended(one, FailureClass.MODEL, tokens=3))).accepted
    totals = (await ledger.census()).totals
    assert (totals.failed, totals.failures, totals.prompt_tokens) == (1, {FailureClass.MODEL: 1}, 3)


async def test_no_total_falls_when_runs_are_forgotten(ledger: Ledger) -> None:
    for number in (1, 2):
        tickets = await submit(ledger, groups=1)
        one, other = await claimed(ledger, tickets[0])
        await ledger.commit(one, ended(one, FailureClass.VERIFIER, tokens=5))
        await ledger.commit(other, Retry(lost=True))
        await ledger.count_republished(RUN, 7)
        before = await ledger.census()
        await ledger.forget_run(RUN)
        await ledger.forget_run(RUN)  # its first answer was lost
        after = await ledger.census()
        assert after.totals == before.totals
        assert (after.runs, after.queued, after.in_flight, after.unarchived) == ({}, 0, 0, 0)
        assert counted(after) == {
            "accepted": 2 * number,
            "failed": number,
            "retried": number,
            "lost": number,
            "republished": 7 * number,
            "prompt_tokens": 5 * number,
            "completion_tokens": 10 * number,
        }
        assert after.totals.failures == {FailureClass.VERIFIER: number}


async def test_runs_are_counted_by_state(ledger: Ledger) -> None:
    for name, state in {"one": RunState.PAUSED, "two": RunState.PAUSED, "three": RunState.CANCELLED}.items():
        await ledger.open_run(spec(run_id=name), name)
        await ledger.set_run_state(name, state)
    assert (await ledger.census()).runs == {RunState.PAUSED: 2, RunState.CANCELLED: 1}
