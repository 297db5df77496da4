"""A run that delivers groups: k of n, replacement, and whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.api import GroupRow
from gym_queue.coordinator import progress
from gym_queue.coordinator.group_log import GroupLog
from gym_queue.coordinator.progress import ProgressFile
from gym_queue.coordinator.run import Cancelled
from gym_queue.errors import DiskFullError, ModelError
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.records import RunState, RunStatus
from gym_queue.testing import async_wait_until
from tests.unit.group_scene import SAMPLES, Scene
from tests.unit.players import Players
from tests.unit.road import RUN, Gate
from tests.unit.small_stack import Examples, Output, Stack, WatchedLedger, hurry
from tests.unit.test_coordinator import Deadly

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gym_queue.coordinator.group_log import GroupLine
    from gym_queue.coordinator.progress import Written
    from gym_queue.ledger.base import Ledger


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def samples_of(group: GroupRow) -> list[int]:
    return sorted(row["sample_index"] for row in group.rollouts)


async def test_a_plain_run_writes_no_groups(tmp_path: Path) -> None:
    stack, output = Stack(), Output(tmp_path)
    async with stack.up(), output.coordinator(stack, 3) as coordinator:
        await coordinator.run()
    assert [path.name for path in output.run_dir.iterdir()] == ["lock"]


async def test_stragglers_of_a_complete_group_are_ended_down_to_the_engine(
    ledger: Ledger, tmp_path: Path
) -> None:
    """The last sample of each group never answers."""
    stragglers = {SAMPLES * index + 3 for index in range(6)}
    scene = Scene(tmp_path, ledger=ledger, engine=Players(hang=stragglers), groups={"usable": 3})
    await scene.run(6)
    groups = scene.groups()
    assert sorted(group.example_index for group in groups) == list(range(6))
    assert [samples_of(group) for group in groups] == [[0, 1, 2]] * 6
    assert sorted(scene.engine.stopped) == sorted(stragglers), "their requests are stopped"
    rows = scene.rows()
    assert len(rows) == 6 * SAMPLES
    assert {(rows[index, 3]["state"], rows[index, 3]["error"]) for index in range(6)} == {
        ("cancelled", "its group has 3 of 4")
    }
    written = scene.written()
    assert (written.state, written.decided.complete, written.rollouts.cancelled) == (RunState.ENDED, 6, 6)
    assert await ledger.runs() == []


async def test_a_group_that_cannot_be_complete_is_short_and_its_rest_is_ended(tmp_path: Path) -> None:
    engine = Players(hang={2, 3}, fail={0, 1}, error=ModelError("no"))
    scene = Scene(tmp_path, engine=engine, groups={"usable": 3})
    await scene.run(2)
    outcomes = {group.example_index: group.outcome for group in scene.groups(dropped=True)}
    assert outcomes == {0: "short", 1: "complete"}
    assert scene.rows()[0, 3]["error"] == "its group cannot have 3 of 4 any more"


async def test_each_dropped_group_is_replaced_by_exactly_one(ledger: Ledger, tmp_path: Path) -> None:
    uniform, short = {1, 2, 6}, {3}
    scene = Scene(
        tmp_path,
        ledger=ledger,
        engine=Players(fail={SAMPLES * index for index in short}, error=ModelError("no")),
        reward=lambda ordinal: 0 if ordinal // SAMPLES in uniform else ordinal % 2,
        groups={"drop_uniform": True, "wanted": 5},
    )
    await scene.run(100, window=1000)
    groups = scene.groups(dropped=True)
    assert sorted(group.example_index for group in groups if group.outcome == "complete") == [0, 4, 5, 7, 8]
    assert {group.example_index for group in groups if group.outcome == "uniform"} == uniform
    assert {group.example_index for group in groups if group.outcome == "short"} == short
    assert {ordinal // SAMPLES for ordinal in scene.engine.begun} == set(range(5 + len(uniform | short)))
    assert len(scene.rows()) == SAMPLES * 9
    assert await ledger.runs() == []


async def test_a_slow_group_delays_nobody_where_more_are_begun(tmp_path: Path) -> None:
    slow = set(range(SAMPLES))
    scene = Scene(tmp_path, engine=Players(hang=slow), groups={"wanted": 3, "oversample": 1})
    await scene.run(100, window=1000)
    assert len(scene.groups(dropped=True)) == 3, "what was not wanted any more is not dropped"
    assert sorted(scene.engine.stopped) == sorted(slow)
    rows = scene.rows()
    assert {rows[0, sample]["error"] for sample in range(SAMPLES)} == {"the run has all the groups it wanted"}
    assert len(rows) == 4 * SAMPLES
    assert scene.written().state is RunState.ENDED


async def test_a_source_that_runs_out_ends_the_run_short_of_what_is_wanted(tmp_path: Path) -> None:
    scene = Scene(tmp_path, groups={"wanted": 50, "usable": 2})
    await scene.run(3)
    assert len(scene.groups()) == 3
    assert scene.written().state is RunState.ENDED


# --- whatever dies, fills up or forgets -------------------------------------------------------------------


@pytest.mark.guarantee("G1")
async def test_a_full_disk_loses_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append, refusals = GroupLog.append, iter(range(3))

    def full(log: GroupLog, lines: list[GroupLine]) -> None:
        if next(refusals, None) is not None:
            raise DiskFullError("no space left on device")
        append(log, lines)

    monkeypatch.setattr(GroupLog, "append", full)
    scene = Scene(tmp_path, groups={"usable": 2})
    await scene.run(9)
    assert sorted(group.example_index for group in scene.groups()) == list(range(9))
    assert next(refusals, None) is None


async def test_a_disk_that_is_full_while_nothing_ends_is_left_to_the_next_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, refused, full = ProgressFile.write, list[int](), asyncio.Event()

    def perhaps(file: ProgressFile, look: Callable[[], Written]) -> None:
        if full.is_set():
            refused.append(1)
            raise DiskFullError("no space left on device")
        write(file, look)

    monkeypatch.setattr(ProgressFile, "write", perhaps)
    scene, source = Scene(tmp_path), Examples(2, closed=False)
    async with scene.stack.up(), scene.output.coordinator(scene.stack, source) as coordinator:
        run = asyncio.create_task(coordinator.run())
        await scene.has_groups(2)
        full.set()
        await async_wait_until(lambda: len(refused) > 2)
        full.clear()
        source.closed = True
        await run
    assert scene.written().state is RunState.ENDED


async def test_what_is_fed_as_the_last_group_becomes_complete_has_its_rows_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second group is on its way into the ledger while the only one that is wanted becomes complete."""
    scene, source, gate = (
        Scene(tmp_path, groups={"wanted": 1, "oversample": 1}),
        Examples(1, closed=False),
        Gate(),
    )
    scene.engine.act = gate
    ledger = scene.stack.ledger
    accept, look, looks = ledger.accept, ledger.run, list[str]()
    late, go_on = asyncio.Event(), asyncio.Event()

    async def slow(run_id: str, cursor: int, *arguments: Any) -> Any:
        if cursor:
            late.set()
            await go_on.wait()
        return await accept(run_id, cursor, *arguments)

    async def counted(run_id: str) -> RunStatus | None:
        looks.append(run_id)
        return await look(run_id)

    monkeypatch.setattr(ledger, "accept", slow)
    monkeypatch.setattr(ledger, "run", counted)
    async with scene.stack.up(), scene.output.coordinator(scene.stack, source) as coordinator:
        run = asyncio.create_task(coordinator.run())
        await async_wait_until(lambda: gate.waiting == SAMPLES)
        source.count = 2
        await late.wait()
        gate.open()
        await scene.has_groups(1)
        before = len(looks)
        await async_wait_until(lambda: run.done() or len(looks) > before + 20)
        assert not run.done()
        go_on.set()
        await run
    assert len(scene.rows()) == 2 * SAMPLES
    assert len(scene.groups(dropped=True)) == 1


@pytest.mark.guarantee("G3")
@pytest.mark.parametrize("seed", range(12))
async def test_coordinators_that_are_killed_leave_each_group_once(tmp_path: Path, seed: int) -> None:
    """They die at any call of the ledger; the last sample of each group hangs, and every third is dropped."""
    chance = random.Random(seed)
    policy = {"usable": 3, "drop_uniform": True, "wanted": chance.choice([None, 8]), "oversample": 2}
    scene = Scene(
        tmp_path,
        ledger=MemoryLedger(),
        engine=Players(hang={SAMPLES * index + 3 for index in range(30)}),
        reward=lambda ordinal: 0 if ordinal // SAMPLES % 3 == 2 else ordinal % 2,
        groups=policy,
    )
    deadly: Any = Deadly(scene.stack.ledger, chance)
    doomed = copy.copy(scene.stack)
    doomed.ledger = deadly
    deaths, cursor, met = 0, "", []
    async with scene.stack.up():
        while deaths < 200:
            async with scene.output.coordinator(doomed, 20) as coordinator:
                run = asyncio.create_task(coordinator.run())
                deadly.aim(run, 25 + 5 * deaths)  # or none of them would live long enough to come to an end
                try:
                    await run
                    break
                except asyncio.CancelledError:
                    deaths += 1
            page = scene.feed.groups(cursor, limit=1000, dropped=True)
            met += page.items
            cursor = page.cursor
    page = scene.feed.groups(cursor, limit=1000, dropped=True)
    assert page.ended is RunState.ENDED
    groups = [GroupRow.model_validate_json(item.data) for item in [*met, *page.items]]
    assert deaths
    indices = [group.example_index for group in groups]
    assert len(set(indices)) == len(indices)
    complete = [group for group in groups if group.outcome == "complete"]
    assert len(complete) == (policy["wanted"] or 14)
    assert all(samples_of(group) == [0, 1, 2] for group in complete)
    assert all((group.example_index % 3 == 2) == (group.outcome == "uniform") for group in groups)
    if not policy["wanted"]:
        assert len(scene.rows()) == 20 * SAMPLES
    assert await scene.stack.ledger.runs() == []


async def test_a_ledger_that_forgets_is_fed_again_and_stragglers_are_ended_again(tmp_path: Path) -> None:
    scene = Scene(
        tmp_path,
        ledger=WatchedLedger(),
        engine=Players(hang={SAMPLES * index + 3 for index in range(6)}),
        groups={"usable": 3},
    )
    ledger = scene.stack.ledger
    end, lost = ledger.end, list[str]()

    async def forgetting(run_id: str, *arguments: Any, **options: Any) -> bool:
        if len(lost) < 2:
            lost.append(run_id)
            await ledger.forget_run(run_id)
        return await end(run_id, *arguments, **options)

    ledger.end = forgetting  # type: ignore[method-assign]
    await scene.run(6)
    assert len(lost) == 2
    assert sorted(group.example_index for group in scene.groups()) == list(range(6))
    assert len(scene.rows()) == 6 * SAMPLES


async def test_a_run_that_was_paused_stays_so_when_another_coordinator_takes_over(tmp_path: Path) -> None:
    scene = Scene(tmp_path, ledger=WatchedLedger())
    ledger = scene.stack.ledger
    await ledger.open_run(scene.output.spec(), RUN)
    await ledger.set_run_state(RUN, RunState.PAUSED)
    async with scene.stack.up(), scene.output.coordinator(scene.stack, 3) as coordinator:
        run = asyncio.create_task(coordinator.run())
        await async_wait_until(lambda: scene.written().state is RunState.PAUSED)
        assert scene.rows() == {}
        await ledger.set_run_state(RUN, RunState.OPEN)
        await run
    assert len(scene.groups()) == 3


async def test_a_run_that_was_cancelled_says_so_before_the_ledger_forgets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, engine=Players(hang=range(100)))
    ledger, states = scene.stack.ledger, []
    forget = ledger.forget_run

    async def seen(run_id: str) -> None:
        states.append(progress.read(scene.output.run_dir).state)
        await forget(run_id)

    monkeypatch.setattr(ledger, "forget_run", seen)
    async with scene.stack.up(), scene.output.coordinator(scene.stack, 3) as coordinator:
        run = asyncio.create_task(coordinator.run())
        await async_wait_until(lambda: scene.engine.begun)
        await ledger.set_run_state(RUN, RunState.CANCELLED)
        with pytest.raises(Cancelled):
            await run
    assert states == [RunState.CANCELLED]
    page = scene.feed.rollouts()
    assert page.ended is RunState.CANCELLED
    assert {json.loads(item.data)["state"] for item in page.items} == {"cancelled"}
