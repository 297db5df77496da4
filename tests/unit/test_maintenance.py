"""The sweep: the work of dead workers goes back (G3), lost tickets come again (G4), poison ends (G6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gym_queue.ledger.base import Ended, Retry
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.lifecycle import RolloutState
from gym_queue.maintenance.audit import audit
from gym_queue.maintenance.reap import reap
from gym_queue.records import Limits, RunState, Stage
from gym_queue.testing import state_of
from tests.contract.ledger_model import summary
from tests.unit.road import RUN, Road, World, group

if TYPE_CHECKING:
    import pytest

    from gym_queue.ledger.base import Claim
    from gym_queue.records import Ticket

TIMEOUT, LEASE, GRACE = 300.0, 60.0, 5.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


class Broker:
    """Says how many tickets lie in each queue."""

    def __init__(self) -> None:
        self.depths = dict.fromkeys(Stage, 0)

    async def depth(self, stage: Stage) -> int:
        return self.depths[stage]


class Fleet(Road):
    """A road whose workers can fall silent, under a clock of our own."""

    def __init__(self, world: World | None = None) -> None:
        self.clock = Clock()
        super().__init__(world=world or World(), ledger=MemoryLedger(self.clock))
        self.broker = Broker()

    async def claim(self, ticket: Ticket, worker: str) -> Claim:
        await self.ledger.heartbeat(worker, {})
        claim = await self.ledger.claim(ticket, worker, LEASE)
        assert claim is not None
        return claim

    async def reap(self) -> int:
        return await reap(self.ledger, self.publisher, TIMEOUT)

    async def audit(self) -> list[Ticket]:
        """Return what the audit published."""
        count = await audit(self.ledger, self.broker, self.publisher, GRACE)
        published = self.publisher.take()
        assert len(published) == count
        return published

    async def workers(self) -> set[str]:
        return {lease.worker for lease in await self.ledger.leases()}


# --- reap -------------------------------------------------------------------------------------------------


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


async def test_an_attempt_past_its_deadline_ends_as_timeout_while_its_worker_lives() -> None:
    fleet = Fleet()
    (ticket,) = await fleet.submit(group(0, [0]))
    await fleet.claim(ticket, "stuck")
    fleet.clock.pass_(LEASE + 4)
    assert await fleet.reap() == 0  # the worker itself ends the stage first
    fleet.clock.pass_(2)
    assert await fleet.reap() == 1
    (row,) = await fleet.rows()
    assert (row["state"], row["class"], row["stage"]) == ("failed", "timeout", "generate")
    assert row["error"] == "worker stuck ran past the stage's deadline"
    assert await fleet.workers() == {"stuck"}


async def test_g6_a_rollout_that_kills_its_workers_is_failed_with_what_is_known() -> None:
    fleet = Fleet()
    tickets = await fleet.submit(group(0, [0]), limits=Limits(max_attempts=3, retry_base_delay=0.0))
    for attempt in (1, 2, 3):
        assert await fleet.rows() == []
        (ticket,) = tickets
        await fleet.claim(ticket, f"victim-{attempt}")
        fleet.clock.pass_(TIMEOUT + 1)
        assert await fleet.reap() == 1
        tickets = fleet.publisher.take()
    assert tickets == []
    (row,) = await fleet.rows()
    assert (row["state"], row["class"], row["attempt"]) == ("failed", "infrastructure", 3)
    assert row["error"] == "worker victim-3 was silent for 301 s"
    assert await fleet.workers() == set()


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


async def test_g4_lost_tickets_come_again_as_many_as_are_missing_the_oldest_first() -> None:
    fleet = Fleet()
    tickets = await fleet.submit(*(group(index) for index in range(5)))
    fleet.clock.pass_(GRACE + 1)
    fleet.broker.depths[Stage.GENERATE] = 3
    assert await fleet.audit() == tickets[:2]
    fleet.broker.depths[Stage.GENERATE] = 5
    assert await fleet.audit() == []


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
