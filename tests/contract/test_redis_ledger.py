"""What is particular to the ledger on Redis: its keys, its scripts, and a connection that fails."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gym_queue import names
from gym_queue.errors import LedgerError
from gym_queue.ledger.base import Ended, Generated, Retry
from gym_queue.ledger.connection import Patience
from gym_queue.ledger.redis import RedisLedger
from gym_queue.records import Stage
from tests.contract.ledgers import lasting_keys
from tests.contract.test_ledger import RUN, claimed, ended, group, spec, submit, summary


def cancelled(index: int, sample: int) -> Ended:
    return Ended(summary=summary(index, sample), row=b"row")


async def test_an_unreachable_redis_is_a_ledger_error() -> None:
    ledger = RedisLedger("redis://127.0.0.1:1/0", patient=False)
    with pytest.raises(LedgerError, match="Redis does not answer"):
        await ledger.run(RUN)


async def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_queue.ledger.views.PATIENT", Patience(connect=1, answer=1, repeat=0.2))
    ledger = RedisLedger("redis://127.0.0.1:1/0")
    for call in (ledger.run(RUN), ledger.heartbeat("a", {})):
        with pytest.raises(LedgerError, match="Redis does not answer"):
            await call


def lose_answers(ledger: RedisLedger) -> list[int]:
    """Let the driver repeat each batch, as when the connection breaks before the answer. Returns the sizes of
    all batches to come.
    """
    run, sizes = ledger._scripts._execute, []

    async def twice(batch: Any) -> Any:
        await run(batch)
        sizes.append(len(batch))
        return await run(batch)

    ledger._scripts._execute = twice  # type: ignore[method-assign]
    return sizes


async def test_a_claim_whose_answer_was_lost_is_granted_again(redis_url: str) -> None:
    """The driver repeats the call: same script, same arguments, same nonce. Another call has another."""
    ledger = RedisLedger(redis_url)
    (ticket,) = await submit(ledger)
    lose_answers(ledger)
    claim = await ledger.claim(ticket, "a", 60)
    assert claim is not None
    assert [one.fence.sample_index for one in claim.samples] == list(ticket.samples)
    assert await ledger.claim(ticket, "a", 60) is None
    await ledger.close()


async def test_samples_that_end_at_once_share_a_call_and_not_their_fate(redis_url: str) -> None:
    ledger = RedisLedger(redis_url)
    await ledger.open_run(spec(samples=5), "key-1")
    (ticket,) = await ledger.accept(RUN, 0, 1, [group(0, (0, 1, 2, 3, 4))])
    fences = await claimed(ledger, ticket)
    await ledger.commit(fences[4], Retry(delay=0))  # its fence is closed now
    before = await ledger._client.info("commandstats")
    receipts = await asyncio.gather(
        *(ledger.commit(fence, ended(fence)) for fence in fences[:3]),
        ledger.commit(fences[4], ended(fences[4])),
        ledger.commit(fences[3], ended(fences[3], "failed")),
    )
    after = await ledger._client.info("commandstats")
    assert [receipt.accepted for receipt in receipts] == [True, True, True, False, True]
    assert after["cmdstat_evalsha"]["calls"] - before["cmdstat_evalsha"]["calls"] == 1
    status = await ledger.run(RUN)
    assert status is not None
    assert (status.succeeded, status.failed, status.refused, status.queued) == (3, 1, 1, 1)
    rows = [event.row for event in await ledger.events(RUN, "", 10, 0)]
    assert rows == [b"0.0", b"0.1", b"0.2", b"0.3"]
    assert [one.sample_index for one in await ledger.open_rollouts(RUN, 10)] == [4]
    assert await ledger.claimed("a", 10) == []
    await ledger.close()


@pytest.mark.guarantee("G1")
async def test_one_attempt_that_is_committed_twice_in_a_shared_call_ends_once(redis_url: str) -> None:
    """As when the first caller was cancelled: its call is on its way all the same."""
    ledger = RedisLedger(redis_url)
    (ticket,) = await submit(ledger)
    fences = await claimed(ledger, ticket)
    first = asyncio.create_task(ledger.commit(fences[0], ended(fences[0])))
    second = asyncio.create_task(ledger.commit(fences[0], ended(fences[0])))
    other = asyncio.create_task(ledger.commit(fences[1], Retry(counted=False)))
    again = asyncio.create_task(ledger.commit(fences[1], Retry(counted=False)))
    await asyncio.sleep(0)
    first.cancel()
    other.cancel()
    assert [(await second).accepted, (await again).accepted] == [False, False]
    status = await ledger.run(RUN)
    assert status is not None
    assert (status.succeeded, status.queued, status.refused) == (1, 1, 2)
    assert len(await ledger.events(RUN, "", 10, 0)) == 1
    await ledger.close()


@pytest.mark.parametrize(("size", "calls"), [(1_000, 1), (300_000, 4)])
async def test_what_is_large_does_not_share_a_call_with_much_else(
    redis_url: str, size: int, calls: int
) -> None:
    ledger = RedisLedger(redis_url)
    await ledger.open_run(spec(samples=10), "key-1")
    (ticket,) = await ledger.accept(RUN, 0, 1, [group(0, tuple(range(10)))])
    fences = await claimed(ledger, ticket)
    before = await ledger._client.info("commandstats")
    payload = b"x" * size
    await asyncio.gather(*(ledger.commit(fence, Generated(payload=payload)) for fence in fences))
    after = await ledger._client.info("commandstats")
    assert after["cmdstat_evalsha"]["calls"] - before["cmdstat_evalsha"]["calls"] == calls
    await ledger.close()


async def test_a_shared_call_whose_answer_was_lost_tells_each_the_same_again(redis_url: str) -> None:
    ledger = RedisLedger(redis_url)
    (ticket,) = await submit(ledger)
    fences = await claimed(ledger, ticket)
    calls = lose_answers(ledger)
    receipts = await asyncio.gather(*(ledger.commit(fence, ended(fence)) for fence in fences))
    assert [receipt.accepted for receipt in receipts] == [True, True]
    assert calls == [1]
    assert len(await ledger.events(RUN, "", 10, 0)) == 2
    await ledger.close()


async def test_a_whole_run_leaves_no_key_but_leases(redis_url: str) -> None:
    """Every way through the ledger, then forget the run: what is left would be left for ever."""
    ledger = RedisLedger(redis_url)
    await ledger.heartbeat("a", {})
    tickets = await submit(ledger, groups=4)
    for ticket in tickets[:3]:
        one, other = await claimed(ledger, ticket)
        verify = await ledger.commit(one, Generated(payload=b"trajectory"))
        (one,) = await claimed(ledger, verify.ticket)
        await ledger.commit(one, ended(one, "failed"))
        await ledger.commit(other, Retry(delay=3600))
        await ledger.end(RUN, cancelled(ticket.example_index, 1))
    for sample in (0, 1):
        await ledger.end(RUN, cancelled(3, sample))
    events = await ledger.events(RUN, "", 10, 0)
    assert await ledger.acknowledge(RUN, events[-1].position) == 8
    assert await lasting_keys(ledger) == {
        names.leases_key(),
        names.worker_key("a"),
        names.run_key(RUN),
        names.runs_key(),
        names.results_key(RUN),
        names.idempotency_key("key-1"),
        names.waiting_key(Stage.GENERATE),  # of the last example, until somebody claims it
        names.delayed_key(),
    }
    await ledger.forget_run(RUN)
    assert await lasting_keys(ledger) == {
        names.leases_key(),
        names.worker_key("a"),
    }
    await ledger.close()


async def test_a_trajectory_goes_when_its_rollout_ends(redis_url: str) -> None:
    ledger = RedisLedger(redis_url)
    tickets = await submit(ledger, groups=2)
    for ticket, end in zip(tickets, ("commit", "cancel"), strict=True):
        index = ticket.example_index
        one, _ = await claimed(ledger, ticket)
        verify = await ledger.commit(one, Generated(payload=b"trajectory"))
        (one,) = await claimed(ledger, verify.ticket)
        assert await ledger._client.hexists(names.group_key(RUN, index), "p:0")
        if end == "commit":
            await ledger.commit(one, ended(one))
        else:
            await ledger.end(RUN, cancelled(index, 0))
        assert not await ledger._client.hexists(names.group_key(RUN, index), "p:0")
    await ledger.close()


@pytest.mark.guarantee("G5")
async def test_g5_what_is_archived_leaves_nothing_in_redis(redis_url: str) -> None:
    """However long a run is, Redis holds what is open of it."""
    ledger = RedisLedger(redis_url)
    await ledger.open_run(spec(), "key-1")
    held = []
    for index in range(50):
        (ticket,) = await ledger.accept(RUN, index, index + 1, [group(index)])
        one, other = await claimed(ledger, ticket)
        verify = await ledger.commit(one, Generated(payload=b"trajectory" * 100))
        for fence in (other, *await claimed(ledger, verify.ticket)):
            await ledger.commit(fence, ended(fence))
        events = await ledger.events(RUN, "", 10, 0)
        assert await ledger.acknowledge(RUN, events[-1].position) == 2
        keys = await lasting_keys(ledger)
        held.append(sum([await ledger._client.memory_usage(key, samples=0) for key in keys]))
    assert max(held) < 1.1 * held[0]
    await ledger.close()


async def test_calls_made_together_share_round_trips(redis_url: str) -> None:
    ledger = RedisLedger(redis_url)
    await submit(ledger, groups=50)
    tickets = (await ledger.waiting(Stage.GENERATE, 0, 50))[1]
    before = (await ledger._client.info("stats"))["total_reads_processed"]
    claims = await asyncio.gather(*(ledger.claim(ticket, "a", 60) for ticket in tickets))
    after = (await ledger._client.info("stats"))["total_reads_processed"]
    assert all(claims)
    assert after - before <= 5
    await ledger.close()


async def test_a_redis_that_forgot_the_scripts_gets_them_again(redis_url: str) -> None:
    ledger = RedisLedger(redis_url)
    (ticket,) = await submit(ledger)
    await ledger._client.script_flush()
    assert await ledger.claim(ticket, "a", 60) is not None
    await ledger.close()


async def test_what_a_worker_never_reads_is_not_kept_for_ever(redis_url: str) -> None:
    ledger = RedisLedger(redis_url)
    (ticket,) = await submit(ledger)
    one, other = await claimed(ledger, ticket)
    await ledger.commit(one, Retry(), revoke=True)
    assert 0 < await ledger._client.ttl(names.revoked_key("a")) <= 3600
    await ledger._client.delete(names.revoked_key("a"))
    assert await ledger._client.zcard(names.claims_key("a")) == 1
    await ledger.end(RUN, ended(other))
    assert await ledger._client.zcard(names.claims_key("a")) == 0
    assert 0 < await ledger._client.ttl(names.revoked_key("a")) <= 3600
    await ledger.drop_lease("a")
    assert await ledger.revoked("a", 10) == [other]
    await ledger.close()


async def test_counting_for_a_forgotten_run_leaves_nothing(redis_url: str) -> None:
    ledger = RedisLedger(redis_url)
    await ledger.count_republished("forgotten", 5)
    assert await lasting_keys(ledger) == set()
    await ledger.close()


async def test_who_looks_at_open_rollouts_is_not_sent_their_trajectories(redis_url: str) -> None:
    ledger = RedisLedger(redis_url)
    (ticket,) = await submit(ledger)
    for fence in await claimed(ledger, ticket):
        await ledger.commit(fence, Generated(payload=b"x" * 1_000_000))
    before = (await ledger._client.info("stats"))["total_net_output_bytes"]
    assert len(await ledger.open_rollouts(RUN, 10)) == 2
    assert await ledger.whereabouts(RUN, 0, 0)
    after = (await ledger._client.info("stats"))["total_net_output_bytes"]
    assert after - before < 100_000
    await ledger.close()


async def test_many_groups_are_read_in_few_round_trips(redis_url: str) -> None:
    ledger = RedisLedger(redis_url)
    tickets = await submit(ledger, groups=300)
    for ticket in tickets:
        await claimed(ledger, ticket)
    before = (await ledger._client.info("stats"))["total_reads_processed"]
    assert len(await ledger.open_rollouts(RUN, 1000)) == 600
    assert len(await ledger.owned("a", None, 1000)) == 600
    after = (await ledger._client.info("stats"))["total_reads_processed"]
    assert after - before < 60  # a pipeline may arrive in parts
    await ledger.close()


async def test_who_is_cancelled_in_a_call_is_cancelled(redis_url: str) -> None:
    """At any moment of it. Python 3.11 forgets a cancellation that comes as the driver sends its command."""

    async def ask() -> None:
        await ledger.run(RUN)
        await asyncio.Event().wait()

    ledger = RedisLedger(redis_url)
    await ledger.run(RUN)
    for moment in range(40):
        task = asyncio.create_task(ask())
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=5)
        assert task.cancelled(), moment
    await ledger.close()
