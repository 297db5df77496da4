"""A run that waits for what is to come: for examples of a source that grows, for the next weights."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.records import Freshness, RunState, Weights
from gym_queue.testing import async_wait_until
from tests.unit.group_scene import SAMPLES, Scene
from tests.unit.road import Gate
from tests.unit.small_stack import Examples, hurry

if TYPE_CHECKING:
    from pathlib import Path

    from gym_queue.ledger.base import Ledger


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


# --- sources that grow ------------------------------------------------------------------------------------


async def test_a_run_ends_when_its_source_is_closed_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody tells it that there is more, or that there will be no more; it looks soon."""
    monkeypatch.setattr("gym_queue.coordinator.feeder._PATIENCE", 60.0)
    monkeypatch.setattr("gym_queue.coordinator.aggregator._WAIT", 60.0)
    scene, source = Scene(tmp_path), Examples(0, closed=False)
    async with scene.stack.up(), scene.output.coordinator(scene.stack, source) as coordinator:
        run = asyncio.create_task(coordinator.run())
        for count in (2, 3, 10):
            source.count = count
            await scene.has_groups(count)
        assert not run.done()
        assert scene.written().state is RunState.OPEN
        source.closed = True
        await run
    assert sorted(scene.rows()) == [(index, sample) for index in range(10) for sample in range(SAMPLES)]
    assert scene.written().state is RunState.ENDED


async def test_a_closed_source_without_examples_is_a_run_without_rows(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    await scene.run(0)
    assert scene.rows() == {}
    assert scene.written().state is RunState.ENDED


class Snapshots(Examples):
    """A source whose iterators end where it ended when they were made."""

    def examples(self, start: int) -> Any:
        return iter(list(super().examples(start)))


async def test_a_source_that_grows_behind_its_reader_is_read_on(tmp_path: Path) -> None:
    scene, source = Scene(tmp_path), Snapshots(1, closed=False)
    async with scene.stack.up(), scene.output.coordinator(scene.stack, source) as coordinator:
        run = asyncio.create_task(coordinator.run())
        for count in (1, 4, 9):
            source.count = count
            await scene.has_groups(count)
        source.closed = True
        await run


# --- freshness --------------------------------------------------------------------------------------------


async def test_no_group_is_begun_that_would_be_too_old_when_its_turn_comes(
    ledger: Ledger, tmp_path: Path
) -> None:
    freshness = Freshness(max_staleness=1, groups_per_version=2)
    scene = Scene(tmp_path, ledger=ledger, freshness=freshness)
    await ledger.announce(Weights(model="stub:", version=3))
    scene.engine.version = 3
    async with scene.stack.up(), scene.output.coordinator(scene.stack, 8, window=100) as coordinator:
        run = asyncio.create_task(coordinator.run())
        for version in (4, 5):
            begun = 2 * (version - 3 + 1)
            await scene.has_groups(begun)
            await async_wait_until(lambda: scene.written().waiting_for)
            assert {ordinal // SAMPLES for ordinal in scene.engine.begun} == set(range(begun))
            waits = scene.written().waiting_for or ""
            assert waits.startswith(f"version {version} of the weights: with version {version - 1}, ")
            scene.engine.version = version
            await ledger.announce(Weights(model="stub:", version=version))
        await run
    assert scene.written().waiting_for is None
    by_index = {group.example_index: group.weight_version for group in scene.groups()}
    assert [version for _, version in sorted(by_index.items())] == [3, 3, 3, 3, 4, 4, 5, 5]


async def test_a_group_that_is_too_old_when_it_is_decided_is_stale(tmp_path: Path) -> None:
    scene = Scene(tmp_path, freshness=Freshness(max_staleness=0, groups_per_version=2))
    gate = Gate()
    scene.engine.act = gate
    async with scene.stack.up(), scene.output.coordinator(scene.stack, 3, window=100) as coordinator:
        run = asyncio.create_task(coordinator.run())
        await async_wait_until(lambda: gate.waiting == 2 * SAMPLES)
        await scene.stack.ledger.announce(Weights(model="stub:", version=1))
        await async_wait_until(lambda: gate.waiting == 3 * SAMPLES)
        gate.open()
        await run
    outcomes = {group.example_index: group.outcome for group in scene.groups(dropped=True)}
    assert outcomes[0] == outcomes[1] == "stale"
    assert scene.written().decided.stale >= 2
