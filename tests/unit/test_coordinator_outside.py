"""A run that somebody else pauses, cancels or forgets, and a disk that is full (G1, G5)."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING

import pytest

from gym_queue.coordinator.archive import Archive
from gym_queue.coordinator.run import Cancelled, Interrupted
from gym_queue.errors import DiskFullError, LedgerError
from gym_queue.maintenance.cancel import cancel_run
from gym_queue.records import Group, RunState
from gym_queue.testing import async_wait_until
from tests.unit.road import RUN, Engine, Gate
from tests.unit.small_stack import SAMPLES, Examples, Output, Stack, WatchedLedger, everything, hurry

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gym_queue.coordinator.run import Coordinator, Progress
    from gym_queue.ledger.base import Event


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


class Scene:
    """A run of ``examples`` whose engine waits at a gate."""

    def __init__(self, folder: Path) -> None:
        self.gate, self.ledger = Gate(), WatchedLedger()
        self.stack = Stack(ledger=self.ledger, engine=Engine(self.gate))
        self.output = Output(folder)
        self.seen: list[Progress] = []

    async def waiting(self, count: int) -> None:
        await async_wait_until(lambda: self.gate.waiting == count, what="rollouts at the gate")


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


async def test_a_run_paused_from_outside_begins_nothing_and_goes_on_when_it_is_opened(scene: Scene) -> None:
    ledger = scene.ledger
    async with (
        scene.stack.up(),
        scene.output.coordinator(scene.stack, 20, on_progress=scene.seen.append) as coordinator,
    ):
        run = asyncio.create_task(coordinator.run())
        await scene.waiting(8)
        assert not scene.seen[-1].paused
        await ledger.set_run_state(RUN, RunState.PAUSED)
        scene.gate.open()
        await async_wait_until(lambda: len(scene.output.places()) == 8)
        await async_wait_until(lambda: scene.seen[-1].paused and scene.seen[-1].succeeded == 8)
        assert (await ledger.status()).accepted == len(ledger.accepted) == 8, "it does not even ask for more"
        assert not run.done()
        await ledger.set_run_state(RUN, RunState.OPEN)
        metrics = await run
    assert scene.output.places() == everything(20)
    assert metrics.rollouts.succeeded == 40
    assert not scene.seen[-1].paused


async def test_a_run_paused_between_look_and_step_loses_no_example(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The ledger refuses what the feeder had taken from its source already."""
    ledger = scene.ledger
    accept, refused = ledger.accept, asyncio.Event()

    async def pausing(*arguments: object) -> object:
        if not refused.is_set():
            refused.set()
            await ledger.set_run_state(RUN, RunState.PAUSED)
        return await accept(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ledger, "accept", pausing)
    scene.gate.open()
    async with scene.stack.up(), scene.output.coordinator(scene.stack, 10) as coordinator:
        run = asyncio.create_task(coordinator.run())
        await refused.wait()
        await async_wait_until(lambda: is_paused(ledger))
        await ledger.set_run_state(RUN, RunState.OPEN)
        await run
    assert scene.output.places() == everything(10)
    assert "lost" not in caplog.text, "a refusal is no loss"


async def is_paused(ledger: WatchedLedger) -> bool:
    return (await ledger.status()).state is RunState.PAUSED


@pytest.mark.parametrize("by", ["canceller", "state"])
async def test_a_cancelled_run_ends_what_it_had_begun_and_begins_no_more(scene: Scene, by: str) -> None:
    """The canceller may die before it has ended a single rollout: then the coordinator does it."""
    async with scene.stack.up(sweep=False), scene.output.coordinator(scene.stack, 20) as coordinator:
        run = asyncio.create_task(coordinator.run())
        await scene.waiting(8)
        if by == "canceller":
            await cancel_run(scene.ledger, RUN, "not wanted")
        else:
            await scene.ledger.set_run_state(RUN, RunState.CANCELLED)
        with pytest.raises(Cancelled):
            await run
        counts = coordinator._metrics.counts()
        assert (counts.cancelled, counts.ended) == (8, 8)
    assert scene.output.places() == everything(4)
    rows = scene.output.out.with_suffix(".failures.jsonl").read_text().splitlines()
    assert {json.loads(row)["state"] for row in rows} == {"cancelled"}
    assert await scene.ledger.runs() == []
    scene.gate.open()
    async with scene.stack.up(), scene.output.coordinator(scene.stack, 20) as coordinator:
        metrics = await coordinator.run()
    assert scene.output.places() == everything(20)
    assert (metrics.rollouts.cancelled, metrics.rollouts.succeeded) == (8, 32)


async def test_a_cancelled_run_that_somebody_forgets_is_not_opened_again(scene: Scene) -> None:
    async with scene.stack.up(), scene.output.coordinator(scene.stack, 20) as coordinator:
        run = asyncio.create_task(coordinator.run())
        await scene.waiting(8)
        scene.ledger.hidden = True
        await scene.ledger.set_run_state(RUN, RunState.CANCELLED)
        await async_wait_until(lambda: coordinator._cancelled)
        await async_wait_until(lambda: ended(scene.ledger, 8))
        await scene.ledger.forget_run(RUN)
        with pytest.raises(Cancelled):
            await run
    assert await scene.ledger.runs() == []
    assert len(scene.ledger.accepted) == 8


async def test_a_run_cancelled_while_nobody_coordinated_it_only_brings_its_rows_in(scene: Scene) -> None:
    async with scene.stack.up():
        async with scene.output.coordinator(scene.stack, 20) as coordinator:
            run = asyncio.create_task(coordinator.run())
            await scene.waiting(8)
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
        await cancel_run(scene.ledger, RUN, "not wanted")
        async with scene.output.coordinator(scene.stack, 20) as coordinator:
            with pytest.raises(Cancelled):
                await coordinator.run()
    assert scene.output.places() == everything(4)


@pytest.mark.parametrize("when", ["begun", "fed"])
async def test_a_run_forgotten_from_outside_is_opened_again(
    scene: Scene, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle, and when all examples had been accepted already."""
    window = 8 if when == "begun" else 100
    scene.gate.open()
    async with scene.stack.up(), scene.output.coordinator(scene.stack, 20, window=window) as coordinator:
        forgetting = forget_once(scene.ledger, after=8 if when == "begun" else 40)
        run = asyncio.create_task(coordinator.run())
        await forgetting
        metrics = await run
    assert scene.output.places() == everything(20)
    assert metrics.rollouts.ended == 40
    assert caplog.text.count("the ledger has lost run run-1") == 1
    assert await scene.ledger.runs() == []


def forget_once(ledger: WatchedLedger, *, after: int) -> asyncio.Future[None]:
    """Let the run be forgotten when so many rollouts have been accepted."""
    accept, done = ledger.accept, asyncio.get_running_loop().create_future()

    async def forgetting(*arguments: object) -> object:
        tickets = await accept(*arguments)  # type: ignore[arg-type]
        if not done.done() and len(ledger.accepted) >= after:
            await ledger.forget_run(RUN)
            done.set_result(None)
        return tickets

    ledger.accept = forgetting  # type: ignore[method-assign, assignment]
    return done


async def test_healed_is_summed_up_over_what_the_ledger_forgot(scene: Scene) -> None:
    async with scene.stack.up(), scene.output.coordinator(scene.stack, 20) as coordinator:
        run = asyncio.create_task(coordinator.run())
        await scene.waiting(8)
        await scene.ledger.count_republished(RUN, 5000)
        await async_wait_until(lambda: republished(coordinator) >= 5000)
        await scene.ledger.forget_run(RUN)
        await async_wait_until(lambda: scene.ledger.run(RUN), what="the run to be opened again")
        await scene.ledger.count_republished(RUN, 3000)
        scene.gate.open()
        metrics = await run
    assert metrics.healed is not None
    assert 8000 <= metrics.healed.republished < 9000, "the sweep of this stack may add some"
    assert scene.output.places() == everything(20)


def republished(coordinator: Coordinator) -> int:
    healed = coordinator._metrics.healed
    return healed.republished if healed else 0


async def test_rows_that_are_missing_in_the_files_are_done_again(scene: Scene) -> None:
    """Deleted by hand, or asked for with --retry: the ledger thinks that they are safe."""
    async with scene.stack.up():
        async with scene.output.coordinator(scene.stack, 20) as coordinator:
            run = asyncio.create_task(coordinator.run())
            scene.gate.open()
            await async_wait_until(lambda: len(scene.output.places()) >= 20)
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
        kept = scene.output.out.read_text().splitlines(keepends=True)[3:]
        scene.output.out.write_text("".join(kept))
        async with scene.output.coordinator(scene.stack, 20) as coordinator:
            await coordinator.run()
    assert scene.output.places() == everything(20)
    assert set(kept) <= set(scene.output.out.read_text().splitlines(keepends=True)), "what was there is kept"


async def test_a_run_whose_coordinator_died_while_it_was_forgotten_starts_over(scene: Scene) -> None:
    scene.gate.open()
    async with scene.stack.up():
        async with scene.output.coordinator(scene.stack, 20) as coordinator:
            await coordinator.run()
        await scene.ledger.open_run(coordinator._spec, RUN)
        await scene.ledger.set_run_state(RUN, RunState.ENDED)
        scene.output.out.write_text("".join(scene.output.out.read_text().splitlines(keepends=True)[:5]))
        async with scene.output.coordinator(scene.stack, 20) as coordinator:
            await coordinator.run()
    assert scene.output.places() == everything(20)


@pytest.mark.guarantee("G3")
async def test_g3_what_a_dead_coordinator_had_accepted_is_published_by_the_next(scene: Scene) -> None:
    """It died between the ledger's step and the broker's. No sweep helps here; and time begins anew."""
    example = next(Examples(1).examples(0))
    opened = await scene.ledger.open_run(scene.output.spec(), RUN)
    await scene.ledger.accept(RUN, 0, 1, [Group(example_index=0, samples=(0, 1), example=example)])
    async with scene.stack.up(sweep=False), scene.output.coordinator(scene.stack, 1) as coordinator:
        run = asyncio.create_task(coordinator.run())
        await scene.waiting(2)
        assert (await scene.ledger.status()).opened_at > opened.opened_at
        scene.gate.open()
        await run
    assert scene.output.places() == everything(1)


# --- a ledger that is away ---------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["open_run", "events", "set_run_state", "forget_run"])
async def test_a_run_whose_ledger_is_away_can_be_interrupted(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """At its begin, in the middle, and when there is nothing left but to say that it is over."""
    called = asyncio.Event()

    async def away(*_: object) -> None:
        called.set()
        await asyncio.sleep(0.001)
        raise LedgerError

    scene.gate.open()
    async with scene.stack.up():
        async with scene.output.coordinator(scene.stack, 5) as coordinator:
            with monkeypatch.context() as patch:
                patch.setattr(scene.ledger, call, away)
                run = asyncio.create_task(coordinator.run())
                await asyncio.wait_for(called.wait(), 10)
                coordinator.interrupt(grace=0.05)
                with pytest.raises(Interrupted):
                    await asyncio.wait_for(run, 10)
        async with scene.output.coordinator(scene.stack, 5) as coordinator:
            await coordinator.run()
    assert scene.output.places() == everything(5)


async def test_a_run_that_has_nothing_to_write_learns_that_it_could_not(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is under way and nothing due: only a write lets the ledger say that Redis takes none."""
    written: list[object] = []

    async def write(*arguments: object) -> None:
        written.append(arguments)

    async with scene.stack.up(sweep=False), scene.output.coordinator(scene.stack, 4) as coordinator:
        run = asyncio.create_task(coordinator.run())
        await scene.waiting(8)
        monkeypatch.setattr(scene.ledger, "count_republished", write)
        await async_wait_until(lambda: (RUN, 0) in written, what="a write")
        scene.gate.open()
        await run


# --- a full disk -------------------------------------------------------------------------------------------


class FullDisk(Archive):
    """Has no room until it is told so."""

    room = False
    tries = 0

    def append(self, events: Sequence[Event]) -> list[Event]:
        FullDisk.tries += 1
        if not FullDisk.room:
            msg = "out.jsonl cannot be written: No space left on device"
            raise DiskFullError(msg)
        return super().append(events)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> type[FullDisk]:
    monkeypatch.setattr(FullDisk, "room", False)
    monkeypatch.setattr(FullDisk, "tries", 0)
    return FullDisk


async def test_a_full_disk_pauses_the_run_until_there_is_room(
    scene: Scene, full_disk: type[FullDisk], caplog: pytest.LogCaptureFixture
) -> None:
    scene.gate.open()
    async with scene.stack.up(), scene.output.coordinator(scene.stack, 20, archive=full_disk) as coordinator:
        run = asyncio.create_task(coordinator.run())
        await async_wait_until(lambda: full_disk.tries >= 5)
        await async_wait_until(lambda: ended(scene.ledger, 8))
        status = await scene.ledger.status()
        assert (status.accepted, status.archived) == (8, 0), "the window is full, and nothing acknowledged"
        full_disk.room = True
        metrics = await run
    assert scene.output.places() == everything(20)
    assert metrics.rollouts.ended == 20 * SAMPLES
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    why = "out.jsonl cannot be written: No space left on device"
    assert lines == [
        f"the run pauses: {why}; it goes on by itself when there is room",
        "the run goes on: there is room again",
    ]


async def ended(ledger: WatchedLedger, count: int) -> bool:
    return (await ledger.status()).ended == count


async def test_a_run_that_waits_for_room_can_be_interrupted(scene: Scene, full_disk: type[FullDisk]) -> None:
    scene.gate.open()
    async with scene.stack.up():
        async with scene.output.coordinator(scene.stack, 20, archive=full_disk) as coordinator:
            run = asyncio.create_task(coordinator.run())
            await async_wait_until(lambda: full_disk.tries >= 2)
            coordinator.interrupt(grace=0.05)
            with pytest.raises(Interrupted):
                await asyncio.wait_for(run, 10)
        assert scene.output.places() == []
        async with scene.output.coordinator(scene.stack, 20) as coordinator:
            await coordinator.run()
    assert scene.output.places() == everything(20)
