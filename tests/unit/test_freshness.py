"""Weights that are announced reach the engine before it generates, and what is too old ends as stale."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.engines.stub import StubEngine, StubOptions
from gym_queue.environments.base import Observation
from gym_queue.errors import EngineUnavailableError, LedgerError
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.records import Freshness, Limits, Sampling, Weights
from tests.unit.road import Engine, Road, World, group

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.engines.base import Completion
    from gym_queue.records import Example, Message

SAMPLING = Sampling()
FRESH: dict[str, Any] = {"freshness": Freshness(max_staleness=1, groups_per_version=8)}


def weights(version: int, uri: str = "") -> Weights:
    return Weights(model="stub:", version=version, uri=uri)


class Trained(Engine):
    """A trainer announces one version more during each of its first ``updates`` calls."""

    def __init__(self, updates: int) -> None:
        super().__init__()
        self.updates = updates
        self.loads: list[Weights] = []
        self.ledger = MemoryLedger()

    async def generate(self, messages: Sequence[Message], **options: Any) -> Completion:
        completion = await super().generate(messages, **options)
        if self.calls <= self.updates:
            newest = await self.ledger.weights("stub:")
            assert newest is not None
            await self.ledger.announce(weights(newest.version + 1))
        return completion

    async def load(self, weights: Weights) -> None:
        self.loads.append(weights)
        await super().load(weights)


class Turns(World):
    """Talks for some turns; another rollout of its worker loads new weights between them."""

    def __init__(self, engine: Engine, turns: int) -> None:
        super().__init__()
        self.engine = engine
        self.turns = turns

    async def step(self, example: Example, session: dict[str, Any], message: Message) -> Observation:
        session["turn"] = session.get("turn", 0) + 1
        await self.engine.load(weights(5 + session["turn"]))
        return Observation(
            messages=({"role": "user", "content": "again"},), done=session["turn"] == self.turns
        )


async def worked_off(road: Road, samples: Sequence[int] = (0,), **changes: Any) -> list[dict[str, Any]]:
    await road.work(*await road.submit(group(0, samples), **changes))
    return await road.rows()


async def test_the_claims_weights_are_loaded_before_it_generates() -> None:
    engine = Trained(updates=0)
    road = Road(engine=engine, ledger=engine.ledger)
    await road.ledger.announce(weights(7, "weights/7"))
    rows = await worked_off(road, (0, 1))
    assert engine.loads == [weights(7, "weights/7")] * 2
    for row in rows:
        sampled = zip(row["trajectory"]["weight_version"], row["trajectory"]["loss_mask"], strict=True)
        assert {version for version, mask in sampled if mask} == {7}


async def test_where_nothing_was_announced_nothing_is_loaded() -> None:
    engine = Trained(updates=0)
    (row,) = await worked_off(Road(engine=engine, ledger=engine.ledger), **FRESH)
    assert engine.loads == []
    assert row["state"] == "succeeded"


async def test_a_trajectory_of_several_turns_has_several_versions() -> None:
    engine = Engine()
    road = Road(Turns(engine, 3), engine=engine)
    await road.ledger.announce(weights(5))
    (row,) = await worked_off(road)
    tokens = row["trajectory"]
    masked = zip(tokens["weight_version"], tokens["loss_mask"], strict=True)
    assert [version for version, mask in masked if mask] == [5] * 8 + [6] * 8 + [7] * 8


async def test_weights_that_cannot_be_loaded_are_tried_again() -> None:
    class Unlucky(Engine):
        tries = 0

        async def load(self, weights: Weights) -> None:
            self.tries += 1
            if self.tries == 1:
                raise EngineUnavailableError("the weights are on their way")
            await super().load(weights)

    road = Road(engine=Unlucky())
    await road.ledger.announce(weights(1))
    (row,) = await worked_off(road)
    assert (row["state"], row["attempt"]) == ("succeeded", 2)


@pytest.mark.guarantee("G6")
@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(("updates", "state"), [(1, "succeeded"), (2, "failed")])
async def test_what_is_too_old_when_it_is_done_is_stale_and_not_scored(
    updates: int, state: str, *, inline: bool
) -> None:
    """The weights that sampled its first turn may be one version behind, not two."""
    engine = Trained(updates)
    world = Turns(engine, updates)
    world._inline = inline
    road = Road(world, engine=engine, ledger=engine.ledger)
    await road.ledger.announce(weights(5))
    (row,) = await worked_off(road, **FRESH)
    assert (row["state"], row["attempt"], engine.calls) == (state, 1, updates)
    assert 5 in row["trajectory"]["weight_version"]
    if state == "failed":
        assert (row["class"], row["stage"]) == ("stale", "generate")
        assert "version 5 sampled it" in row["error"]
        assert "reward" not in row
        assert row["timings"]["generate"] >= 0
        assert row["timings"]["verify"] is None


async def test_without_freshness_nothing_is_too_old_and_the_ledger_is_not_asked() -> None:
    class Curious(MemoryLedger):
        asked = 0

        async def weights(self, model: str) -> Weights | None:
            self.asked += 1
            return await super().weights(model)

    engine = Trained(updates=0)
    ledger = engine.ledger = Curious()
    road = Road(engine=engine, ledger=ledger)
    await ledger.announce(weights(100))
    (row,) = await worked_off(road)
    assert (row["state"], ledger.asked) == ("succeeded", 0)


async def test_without_token_ids_the_claimed_weights_count() -> None:
    class Silent(Trained):
        async def generate(self, messages: Sequence[Message], **options: Any) -> Completion:
            completion = await super().generate(messages, **options)
            return completion.model_copy(update={"token_ids": None, "prompt_token_ids": None})

    for updates, state in ((1, "succeeded"), (2, "failed")):
        engine = Silent(updates)
        road = Road(Turns(engine, updates), engine=engine, ledger=engine.ledger)
        await road.ledger.announce(weights(5))
        (row,) = await worked_off(road, **FRESH)
        assert (row["state"], row["trajectory"]) == (state, None)


async def test_a_ledger_that_is_away_is_no_verdict_on_freshness() -> None:
    class Away(MemoryLedger):
        async def weights(self, model: str) -> Weights | None:
            raise LedgerError

    road = Road(ledger=Away())
    (row,) = await worked_off(road, **FRESH, limits=Limits(store_timeout=0.05, retry_base_delay=0.0))
    assert (row["state"], row["class"], row["attempt"]) == ("failed", "infrastructure", 3)


async def test_the_stub_stamps_the_version_that_a_completion_began_with() -> None:
    engine = StubEngine(StubOptions(delay=0.001))
    await engine.load(weights(3))
    call = asyncio.create_task(
        engine.generate(({"role": "user", "content": "?"},), sampling=SAMPLING, seed=None)
    )
    await asyncio.sleep(0)
    await engine.load(weights(4))
    await engine.load(weights(2))
    assert (await call).weight_version == 3
    later = await engine.generate(({"role": "user", "content": "?"},), sampling=SAMPLING, seed=None)
    assert later.weight_version == 4
