"""A run from its first example to its last row, whatever happens to coordinator, ledger or disk (G1, G5)."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.coordinator.archive import Archive
from gym_queue.coordinator.run import Interrupted
from gym_queue.errors import ConflictError, StorageError
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.records import RunState, RunStatus
from gym_queue.testing import async_wait_until
from tests.unit.road import RUN, Engine, Gate, run_spec
from tests.unit.small_stack import FlakyLedger, Output, Stack, WatchedLedger, everything, hurry

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gym_queue.coordinator.run import Progress
    from gym_queue.ledger.base import Event, Ledger


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


async def settle() -> None:
    """Let everything that can go on go on."""
    for _ in range(200):
        await asyncio.sleep(0)


async def test_a_run_ends_with_each_rollout_once_and_leaves_no_trace_in_the_ledger(tmp_path: Path) -> None:
    stack, output = Stack(), Output(tmp_path)
    seen: list[Progress] = []
    async with stack.up(), output.coordinator(stack, 20, on_progress=seen.append) as coordinator:
        metrics = await coordinator.run()
    assert output.places() == everything(20)
    assert (metrics.rollouts.accepted, metrics.rollouts.succeeded) == (40, 40)
    assert metrics.reward.mean == 1.0
    assert (seen[-1].succeeded, seen[-1].in_flight, seen[-1].total) == (40, 0, 40)
    assert await stack.ledger.runs() == []


@pytest.mark.guarantee("G5")
@pytest.mark.parametrize(("window", "most"), [(8, 8), (7, 6), (1, 2)])
async def test_g5_never_more_is_open_than_the_window(tmp_path: Path, window: int, most: int) -> None:
    """A window smaller than a group lets one group through, or nothing would ever run."""
    ledger = WatchedLedger()
    stack, output = Stack(ledger=ledger), Output(tmp_path)
    async with stack.up(), output.coordinator(stack, 20, window=window) as coordinator:
        await coordinator.run()
    assert ledger.most_open == {RUN: most}
    assert output.places() == everything(20)


@pytest.mark.guarantee("G5")
async def test_g5_nothing_is_published_while_results_are_not_consumed(tmp_path: Path) -> None:
    ledger = WatchedLedger()
    ledger.hidden = True
    stack, output = Stack(ledger=ledger), Output(tmp_path)
    async with stack.up(), output.coordinator(stack, 20, window=8) as coordinator:
        run = asyncio.create_task(coordinator.run())
        await async_wait_until(lambda: ledger.accepted)
        await async_wait_until(lambda: ended_all(ledger))
        before = ledger.looks
        await async_wait_until(lambda: ledger.looks >= before + 3, what="the feeder to look for room")
        assert (await ledger.status()).accepted == 8
        ledger.hidden = False
        await run
    assert output.places() == everything(20)


async def ended_all(ledger: WatchedLedger) -> bool:
    status = await ledger.status()
    return status.ended == status.accepted


class FullDisk(Archive):
    def append(self, events: Sequence[Event]) -> list[Event]:
        raise StorageError("no space left on device")


@pytest.mark.guarantee("G1")
async def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path: Path) -> None:
    ledger = WatchedLedger()
    stack, output = Stack(ledger=ledger), Output(tmp_path)
    async with stack.up():
        async with output.coordinator(stack, 10, archive=FullDisk) as coordinator:
            with pytest.raises(StorageError, match="no space"):
                await coordinator.run()
        assert (await ledger.status()).archived == 0
        assert await ledger.events(RUN, "", 100, 0) != []
        async with output.coordinator(stack, 10) as coordinator:
            await coordinator.run()
    assert output.places() == everything(10)


async def test_g9_an_interrupted_run_is_continued_by_the_next_coordinator(tmp_path: Path) -> None:
    gate, ledger = Gate(), WatchedLedger()
    stack, output = Stack(ledger=ledger, engine=Engine(gate)), Output(tmp_path)
    async with stack.up():
        async with output.coordinator(stack, 20, window=8) as coordinator:
            run = asyncio.create_task(coordinator.run())
            await async_wait_until(lambda: gate.waiting == 8)
            coordinator.interrupt(grace=60.0)
            await async_wait_until(lambda: is_paused(ledger))
            gate.open()  # what is in flight ends, and nothing else begins
            with pytest.raises(Interrupted):
                await run
        assert (await ledger.status()).accepted == 8
        assert output.places() == everything(4)
        async with output.coordinator(stack, 20) as coordinator:
            metrics = await coordinator.run()
    assert output.places() == everything(20)
    assert metrics.rollouts.ended == 40
    assert sorted(ledger.accepted) == everything(20)


async def test_a_feeder_that_is_stopped_as_it_is_told_of_room_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the end of a run would wait for it, for ever."""
    monkeypatch.setattr("gym_queue.coordinator.feeder._PATIENCE", 60.0)
    async with Output(tmp_path).coordinator(Stack(), 0) as coordinator:
        feeder = coordinator._feeder
        for moment in range(10):
            task = asyncio.create_task(feeder.run())
            await settle()
            feeder.room_changed.set()
            for _ in range(moment):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task], timeout=5)
            assert task.cancelled(), moment


async def is_paused(ledger: WatchedLedger) -> bool:
    return (await ledger.status()).state is RunState.PAUSED


async def test_what_is_not_done_within_the_grace_period_waits_for_the_next(tmp_path: Path) -> None:
    gate = Gate()
    stack, output = Stack(engine=Engine(gate)), Output(tmp_path)
    async with stack.up():
        async with output.coordinator(stack, 5) as coordinator:
            run = asyncio.create_task(coordinator.run())
            await async_wait_until(lambda: gate.waiting)
            coordinator.interrupt(grace=0.01)
            with pytest.raises(Interrupted):
                await run
        assert output.places() == []
        gate.open()
        async with output.coordinator(stack, 5) as coordinator:
            await coordinator.run()
    assert output.places() == everything(5)


@pytest.mark.guarantee("G9")
async def test_samples_that_the_files_hold_are_not_done_again(tmp_path: Path) -> None:
    """The ledger may be a new one: the files are what counts."""
    output = Output(tmp_path)
    stack = Stack()
    async with stack.up(), output.coordinator(stack, 6) as coordinator:
        await coordinator.run()
    lines = output.out.read_text().splitlines(keepends=True)
    kept = [
        line for line in lines if '"example_index":2,' not in line and '"rollout_id":"run-1.4.1"' not in line
    ]
    assert len(kept) == 9
    output.out.write_text("".join(kept))
    ledger = WatchedLedger()
    stack = Stack(ledger=ledger)
    async with stack.up(), output.coordinator(stack, 6) as coordinator:
        metrics = await coordinator.run()
    assert ledger.accepted == [(2, 0), (2, 1), (4, 1)]
    assert output.places() == everything(6)
    assert metrics.rollouts.ended == 12


async def test_a_run_id_that_stands_for_something_else_is_refused(tmp_path: Path) -> None:
    stack, output = Stack(), Output(tmp_path)
    await stack.ledger.open_run(run_spec(model="stub:?text=other"), RUN)
    async with output.coordinator(stack, 2) as coordinator:
        with pytest.raises(ConflictError):
            await coordinator.run()


# --- priorities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("priority", "share"), [(5, 8), (0, 32), (-5, 64)])
async def test_a_run_under_one_of_higher_priority_gets_little(
    tmp_path: Path, priority: int, share: int
) -> None:
    """The first run is of priority 5, 0 or -5 and has the window full; the second is of priority 0."""
    gate, ledger = Gate(), WatchedLedger()
    stack = Stack(ledger=ledger, engine=Engine(gate))
    first, second = Output(tmp_path, name="first"), Output(tmp_path, name="second")
    async with (
        stack.up(),
        first.coordinator(stack, 70, window=64, priority=priority) as one,
        second.coordinator(stack, 70, window=64) as two,
    ):
        runs = [asyncio.create_task(one.run())]
        await async_wait_until(lambda: ledger.most_open.get("first") == 64)
        runs.append(asyncio.create_task(two.run()))
        await async_wait_until(lambda: ledger.most_open.get("second") == share)
        await settle()
        assert (await ledger.status("second")).open == share
        gate.open()
        await asyncio.gather(*runs)
    assert first.places() == second.places() == everything(70)


@pytest.mark.parametrize(("weight", "share"), [(1.0, 32), (3.0, 48), (0.6, 24), (0.01, 2)])
async def test_runs_of_equal_priority_share_the_window_by_their_weights(
    tmp_path: Path, weight: float, share: int
) -> None:
    """The first run, of weight 1, has the window full. However little a share is, a group is at work."""
    gate, ledger = Gate(), WatchedLedger()
    stack = Stack(ledger=ledger, engine=Engine(gate))
    first, second = Output(tmp_path, name="first"), Output(tmp_path, name="second", weight=weight)
    async with (
        stack.up(),
        first.coordinator(stack, 70, window=64) as one,
        second.coordinator(stack, 70, window=64) as two,
    ):
        runs = [asyncio.create_task(one.run())]
        await async_wait_until(lambda: ledger.most_open.get("first") == 64)
        runs.append(asyncio.create_task(two.run()))
        await async_wait_until(lambda: ledger.most_open.get("second") == share)
        await settle()
        assert (await ledger.status("second")).open == share
        gate.open()
        await asyncio.gather(*runs)
    assert first.places() == second.places() == everything(70)


async def test_shares_of_the_window_are_whole_and_only_peers_count(tmp_path: Path) -> None:
    async with Output(tmp_path).coordinator(Stack(), 1, window=30) as coordinator:
        mine = RunStatus(spec=run_spec(weight=0.1), state=RunState.OPEN)
        peer = mine.model_copy(update={"spec": run_spec(run_id="b", weight=0.1), "accepted": 9})
        idle = mine.model_copy(update={"spec": run_spec(run_id="c", weight=70.0)})
        lower = peer.model_copy(update={"spec": run_spec(run_id="d", weight=70.0, priority=-1)})
        share = coordinator._feeder._share
        assert await share(mine, [mine, peer, peer, idle, lower]) == 10
        assert await share(lower, [mine, peer, lower]) == 30 // 8


# --- whatever dies ------------------------------------------------------------------------------------------


class Deadly:
    """A ledger that kills its coordinator: at the n-th call, before or after it is done."""

    def __init__(self, ledger: Ledger, chance: random.Random) -> None:
        self._ledger = ledger
        self._chance = chance
        self.victim: asyncio.Task[Any] | None = None
        self._left = 0

    def aim(self, victim: asyncio.Task[Any], most: int = 25) -> None:
        self.victim, self._left = victim, self._chance.randint(1, most)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._ledger, name)

        async def call(*arguments: Any) -> Any:
            self._left -= 1
            after = self._chance.random() < 0.5
            if self._left <= 0 and not after:
                await self._kill()
            answer = await method(*arguments)
            if self._left <= 0 and after:
                await self._kill()
            return answer

        return call

    async def _kill(self) -> None:
        assert self.victim is not None
        self.victim.cancel()
        await asyncio.Event().wait()


@pytest.mark.guarantee("G3")
@pytest.mark.parametrize("seed", range(8))
async def test_g1_coordinators_that_are_killed_leave_each_rollout_once(tmp_path: Path, seed: int) -> None:
    stack, output = Stack(), Output(tmp_path)
    deadly: Any = Deadly(stack.ledger, random.Random(seed))
    deaths = 0
    async with stack.up():
        while True:
            async with output.coordinator(stack, 15) as coordinator:
                coordinator._ledger = deadly
                run = asyncio.create_task(coordinator.run())
                deadly.aim(run)
                try:
                    metrics = await run
                    break
                except asyncio.CancelledError:
                    deaths += 1
    assert deaths
    assert output.places() == everything(15)
    assert metrics.rollouts.ended == 30
    assert await stack.ledger.runs() == []


class SlowDisk(Archive):
    """Tells when it writes, and whether it was closed meanwhile."""

    started: asyncio.Event
    loop: asyncio.AbstractEventLoop
    closed = False
    torn = False

    def append(self, events: Sequence[Event]) -> list[Event]:
        self.loop.call_soon_threadsafe(self.started.set)
        asyncio.run_coroutine_threadsafe(settle(), self.loop).result()
        SlowDisk.torn = SlowDisk.closed
        return super().append(events)

    def close(self) -> None:
        SlowDisk.closed = True
        super().close()


async def test_a_coordinator_that_is_cancelled_lets_go_of_the_archive_first(tmp_path: Path) -> None:
    """Whoever cancels closes the files next: no thread may still be writing them."""
    SlowDisk.started, SlowDisk.loop = asyncio.Event(), asyncio.get_running_loop()
    stack, output = Stack(), Output(tmp_path)
    async with stack.up():
        async with output.coordinator(stack, 5, archive=SlowDisk) as coordinator:
            run = asyncio.create_task(coordinator.run())
            await SlowDisk.started.wait()
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
        assert not SlowDisk.torn
        rows = len(output.places())
        assert rows
        assert coordinator._metrics.counts().ended == rows
        async with output.coordinator(stack, 5) as coordinator:
            await coordinator.run()
    assert output.places() == everything(5)


@pytest.mark.parametrize("seed", range(5))
async def test_g1_a_ledger_that_comes_and_goes_leaves_each_rollout_once(tmp_path: Path, seed: int) -> None:
    ledger = MemoryLedger()
    flaky: Any = FlakyLedger(ledger, random.Random(seed), share=0.1)
    stack, output = Stack(ledger=flaky), Output(tmp_path)
    async with stack.up(), output.coordinator(stack, 15) as coordinator:
        metrics = await coordinator.run()
    assert output.places() == everything(15)
    assert (metrics.rollouts.succeeded, metrics.rollouts.failed) == (30, 0)
    assert await ledger.runs() == []
