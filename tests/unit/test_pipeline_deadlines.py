"""Every wait of a worker has an end (G7): of a stage, of a rollout, of a ledger that does not answer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.ledger.memory import MemoryLedger
from gym_queue.lifecycle import RolloutState
from gym_queue.maintenance.disown import disown
from gym_queue.pipeline import attempt_of
from gym_queue.records import Limits, RunState, Stage
from gym_queue.stages import longest
from gym_queue.testing import async_wait_until
from tests.unit.road import RUN, Engine, Gate, Road, World, failing_engine, group
from tests.unit.silent_fleet import Clock
from tests.unit.standstill import stand_still

if TYPE_CHECKING:
    from gym_queue.environments.base import Observation
    from gym_queue.ledger.base import Claim, Outcome, Receipt
    from gym_queue.records import Example, Fence, Ticket

LIMITS = Limits(generate_timeout=100.0, tool_timeout=10.0, verify_timeout=1000.0, store_timeout=1.0)


async def test_a_claim_covers_all_that_its_stage_may_take() -> None:
    leases: list[float] = []

    class Ledger(MemoryLedger):
        async def claim(self, ticket: Ticket, worker: str, lease: float) -> Claim | None:
            leases.append(lease)
            return await super().claim(ticket, worker, lease)

    road = Road(World(inline=False), ledger=Ledger())
    await road.work(*await road.submit(group(0, [0]), limits=LIMITS))
    assert leases == [1111.0, 1001.0]  # an inline verifier is asked within the first
    assert [longest(stage, LIMITS) for stage in Stage] == leases


async def one_row(road: Road, limits: Limits) -> dict[str, Any]:
    await road.work(*await road.submit(group(0, [0]), limits=limits))
    (row,) = await road.rows()
    return row


async def test_g7_a_rollout_that_had_its_time_ends_as_timeout_whatever_its_stage_may_take() -> None:
    road = Road(engine=Engine(Gate()))
    row = await one_row(road, Limits(rollout_timeout=0.05))
    assert (row["class"], row["stage"]) == ("timeout", "generate")
    assert row["error"] == "the rollout was not done 0.05 s (rollout_timeout) after it was accepted"


@pytest.mark.parametrize("seconds", [50.0, 5000.0])
async def test_g7_the_time_of_earlier_attempts_counts(seconds: float) -> None:
    clock = Clock()
    road = Road(ledger=MemoryLedger(clock), engine=Engine(Gate()))
    (ticket,) = await road.submit(group(0, [0]), limits=Limits(rollout_timeout=50.0))
    clock.pass_(seconds)
    await road.pipeline.generate(ticket)
    (row,) = await road.rows()
    assert row["class"] == "timeout"
    assert "rollout_timeout" in row["error"]


async def test_g7_an_inline_verifier_gets_what_is_left() -> None:
    row = await one_row(Road(World(verify=Gate())), Limits(rollout_timeout=0.05))
    assert (row["class"], row["stage"]) == ("timeout", "verify")
    assert "rollout_timeout" in row["error"]
    assert row["messages"][-1]["content"] == "ok"


async def test_g7_what_generating_took_is_not_left_to_the_verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("gym_queue.stages.time", SimpleNamespace(monotonic=clock))

    async def act() -> None:
        clock.pass_(49.99)

    road = Road(World(verify=Gate()), engine=Engine(act))
    row = await one_row(road, Limits(rollout_timeout=50.0, verify_timeout=2.0))
    assert (row["class"], row["stage"]) == ("timeout", "verify")
    assert "rollout_timeout" in row["error"]


async def test_a_run_that_is_opened_again_gives_its_rollouts_their_time_again() -> None:
    async def act() -> None:
        for _ in range(5):  # long enough to be ended
            await asyncio.sleep(0)

    clock = Clock()
    road = Road(ledger=MemoryLedger(clock), engine=Engine(act))
    (ticket,) = await road.submit(group(0, [0]), limits=Limits(rollout_timeout=50.0))
    await road.ledger.set_run_state(RUN, RunState.PAUSED)
    clock.pass_(1000.0)
    await road.ledger.set_run_state(RUN, RunState.OPEN)
    await road.work(ticket)
    assert [row["state"] for row in await road.rows()] == ["succeeded"]


class SilentLedger(MemoryLedger):
    """Does not answer ``commit``, or ``claim``, while told so."""

    def __init__(self, *silent: str) -> None:
        super().__init__()
        self.silent = set(silent)

    async def claim(self, ticket: Ticket, worker: str, lease: float) -> Claim | None:
        claim = await super().claim(ticket, worker, lease)
        await self._answer("claim")
        return claim

    async def commit(self, fence: Fence, outcome: Outcome, *, revoke: bool = False) -> Receipt:
        await self._answer("commit")
        return await super().commit(fence, outcome, revoke=revoke)

    async def _answer(self, name: str) -> None:
        if name in self.silent:
            await asyncio.Event().wait()


SHORT = Limits(store_timeout=0.02, retry_base_delay=0.0)


@pytest.mark.guarantee("G7")
async def test_g7_an_outcome_that_the_ledger_does_not_take_is_dropped_and_its_rollout_handed_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ledger = SilentLedger("commit")
    road = Road(ledger=ledger)
    await road.work(*await road.submit(group(0), limits=SHORT))
    assert caplog.text.count("outcomes are lost") == 1
    ledger.silent.clear()
    assert len(await ledger.owned("gpu", None, 10)) == 2
    unknown = await disown(ledger, road.publisher, "gpu", road.pipeline.running())
    assert await disown(ledger, road.publisher, "gpu", road.pipeline.running(), unknown) == frozenset()
    await road.work(*road.publisher.take())
    assert [row["state"] for row in await road.rows()] == ["succeeded"] * 2


async def test_g7_a_claim_that_is_not_answered_is_handed_back() -> None:
    ledger = SilentLedger("claim")
    road = Road(ledger=ledger)
    (ticket,) = await road.submit(group(0), limits=SHORT)
    await road.pipeline.generate(ticket)
    assert await ledger.owned("gpu", None, 10) == []
    assert [t.attempt for t in road.publisher.tickets] == [2, 2]


async def test_a_session_that_does_not_close_holds_its_worker_no_longer_than_a_call_may_take() -> None:
    class Open(World):
        async def close(self, session: dict[str, Any]) -> None:
            await Gate()()

    row = await one_row(Road(Open(), engine=Engine(Gate())), Limits(generate_timeout=0.01, tool_timeout=0.01))
    assert row["error"] == "generating took longer than 0.01 s"


async def test_a_hung_environment_ends_as_timeout() -> None:
    class Hung(World):
        async def reset(  # type: ignore[override]
            self, example: Example, session: dict[str, Any]
        ) -> Observation:
            await Gate()()
            return super().reset(example, session)

    row = await one_row(Road(Hung()), Limits(tool_timeout=0.01))
    assert (row["class"], row["stage"]) == ("timeout", "generate")
    assert "tool_timeout" in row["error"]


async def test_a_worker_that_stood_still_blames_no_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for its engine, nor for its environment, nor for its verifier: each is tried again."""

    async def freeze() -> None:
        stand_still(monkeypatch, 1000.0)
        await Gate()()

    class Frozen(World):
        async def reset(  # type: ignore[override]
            self, example: Example, session: dict[str, Any]
        ) -> Observation:
            await freeze()
            return super().reset(example, session)

    limits = Limits(generate_timeout=500.0, tool_timeout=10.0, verify_timeout=10.0, retry_base_delay=0.0)
    for world, engine in ((World(), Engine(freeze)), (Frozen(), Engine()), (World(verify=freeze), Engine())):
        road = Road(world, engine=engine)
        (ticket,) = await road.submit(group(0, [0]), limits=limits)
        await road.pipeline.generate(ticket)
        found = await road.ledger.whereabouts(RUN, 0, 0)
        assert found is not None
        assert found.state is RolloutState.QUEUED
        assert "the worker stood still for" in found.reason


async def test_what_runs_is_known_from_before_its_claim_until_after_its_commit() -> None:
    class Ledger(MemoryLedger):
        async def claim(self, ticket: Ticket, worker: str, lease: float) -> Claim | None:
            seen.append(road.pipeline.running())
            return await super().claim(ticket, worker, lease)

        async def commit(self, fence: Fence, outcome: Outcome, *, revoke: bool = False) -> Receipt:
            seen.append(road.pipeline.running())
            fences.append(fence)
            return await super().commit(fence, outcome, revoke=revoke)

    seen: list[Any] = []
    fences: list[Fence] = []
    gates = [Gate(), Gate()]
    free = iter(gates)

    async def act() -> None:
        await next(free)()

    road = Road(ledger=Ledger(), engine=Engine(act))
    (ticket,) = await road.submit(group(0))
    task = asyncio.create_task(road.pipeline.generate(ticket))
    await async_wait_until(lambda: all(gate.waiting for gate in gates))
    gates[0].open()
    await async_wait_until(road.events)
    assert road.pipeline.running() == seen[0] - {attempt_of(fences[0])}
    gates[1].open()
    await task
    assert [len(running) for running in seen] == [2, 2, 1]
    assert road.pipeline.running() == frozenset()


async def test_why_another_attempt_is_made_is_kept() -> None:
    road = Road(engine=failing_engine(OSError("no route")))
    (ticket,) = await road.submit(group(0, [0]), limits=Limits())
    await road.pipeline.generate(ticket)
    found = await road.ledger.whereabouts(RUN, 0, 0)
    assert found is not None
    assert found.reason == "unexpected OSError: no route"
