"""One head drives the runs of all: who it is may change at any moment (G1, G3)."""

from __future__ import annotations

import asyncio
import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue import names
from gym_queue.api import MixPart, RunRequest
from gym_queue.coordinator.archive import is_being_written
from gym_queue.coordinator.progress import ProgressFile
from gym_queue.coordinator.run_folder import RunFolder
from gym_queue.errors import LedgerError, StorageError
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.records import GroupPolicy, RunState
from gym_queue.testing import async_wait_until
from tests.unit.heads import Head, hurry_leaders
from tests.unit.road import Engine, Gate
from tests.unit.small_stack import Stack, WatchedLedger, everything
from tests.unit.test_inbox import body

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gym_queue.coordinator.progress import Written

REQUEST = RunRequest(model="stub:", samples=2)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry_leaders(monkeypatch)


def _has_rows(head: Head, run_id: str, count: int) -> bool:
    return len(head.places(run_id)) == count


async def forgotten(stack: Stack) -> bool:
    return await stack.ledger.runs() == []


async def test_a_run_is_driven_from_its_first_example_to_its_last_row(tmp_path: Path) -> None:
    stack = Stack()
    head = Head(stack, tmp_path)
    async with stack.up(), head.up():
        view, _ = await head.runs.create(REQUEST)
        run_id = view.run_id
        await head.runs.append(run_id, body("a", "b", "c"))
        await async_wait_until(lambda: len(head.places(run_id)) == 6, what="the rows of three examples")
        assert (await head.runs.show(run_id)).state is RunState.OPEN  # more may come
        await head.runs.append(run_id, body("d"))
        await head.runs.close(run_id)
        view = await head.done(run_id)
        await async_wait_until(partial(forgotten, stack), what="the ledger to forget it")
    assert (view.state, view.closed, view.examples) == (RunState.ENDED, True, 4)
    assert (view.accepted, view.succeeded, view.archived, view.groups.complete) == (8, 8, 8, 4)
    assert head.places(run_id) == everything(4)
    metrics = head.metrics(run_id)
    assert (metrics["run_id"], metrics["complete"], metrics["rollouts"]["succeeded"]) == (run_id, True, 8)


async def test_examples_that_are_appended_where_their_run_is_driven_begin_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_PATIENCE", "_SOON"):  # the feeder looks for nothing by itself
        monkeypatch.setattr(f"gym_queue.coordinator.feeder.{name}", 3600.0)
    stack = Stack()
    head = Head(stack, tmp_path)
    async with stack.up(), head.up():
        view, _ = await head.runs.create(REQUEST)
        for place, prompt in enumerate("abc"):
            await head.runs.append(view.run_id, body(prompt))
            await async_wait_until(partial(_has_rows, head, view.run_id, 2 * (place + 1)))


async def test_who_leads_says_in_its_process_how_far_each_run_is(tmp_path: Path) -> None:
    stack = Stack()
    head, other = Head(stack, tmp_path), Head(stack, tmp_path)
    async with stack.up(), head.up():
        views = [await head.submit(REQUEST, "a", "b"), await other.submit(REQUEST, "c")]
        for view in views:
            await head.done(view.run_id)
    for view in views:
        folder = RunFolder(tmp_path / view.run_id)
        heard = [written for run_dir, written in head.heard if run_dir == folder.paths.run_dir]
        assert heard[-1] == folder.written()
        assert heard[-1].final
        assert [written.rows for written in heard] == sorted(written.rows for written in heard)
    assert other.heard == []


async def test_a_mix_needs_nothing_but_its_request(tmp_path: Path) -> None:
    stack = Stack()
    head = Head(stack, tmp_path)
    parts = (MixPart(name="counted", size=3), MixPart(name="counted", size=2, seed=1))
    async with stack.up(), head.up():
        view, _ = await head.runs.create(REQUEST.model_copy(update={"environments": parts}))
        view = await head.done(view.run_id)
    assert (view.state, view.accepted) == (RunState.ENDED, 10)


async def test_runs_of_other_heads_are_found_in_the_folder(tmp_path: Path) -> None:
    stack = Stack()
    leading, other = Head(stack, tmp_path, quiet=True), Head(stack, tmp_path)
    async with stack.up(), leading.up():
        for _ in range(2):
            view = await other.submit(REQUEST, "a", "b")
            assert (await other.done(view.run_id)).succeeded == 4
    other.runs.close_threads()


async def test_runs_of_the_command_are_left_alone(tmp_path: Path) -> None:
    """They are in the ledger, and not in the folder."""
    stack = Stack()
    head = Head(stack, tmp_path)
    async with stack.up(), head.up():
        view, _ = await head.runs.create(REQUEST)
        await stack.ledger.open_run(view.spec.model_copy(update={"run_id": "mine"}), "mine")
        ended = await head.submit(REQUEST, "a")
        await head.done(ended.run_id)
        status = await stack.ledger.run("mine")
        assert status is not None
        assert (status.state, status.cursor) == (RunState.OPEN, 0)


async def test_a_run_that_is_over_does_not_stay_in_the_ledger(tmp_path: Path) -> None:
    """Its leader wrote the end, and died before the ledger forgot it."""
    stack = Stack()
    head = Head(stack, tmp_path)
    async with stack.up(), head.up():
        view = await head.done((await head.submit(REQUEST, "a")).run_id)
        await stack.ledger.open_run(view.spec, view.run_id)
    async with Head(stack, tmp_path).up():
        await async_wait_until(partial(forgotten, stack))
        assert (await head.runs.show(view.run_id)).state is RunState.ENDED


@pytest.mark.guarantee("G3")
async def test_g3_the_next_leader_goes_on_where_one_ended(tmp_path: Path) -> None:
    """Told to end, it makes room at once, and each rollout has one row."""
    gate, ledger = Gate(), WatchedLedger()
    stack = Stack(ledger=ledger, engine=Engine(gate))
    first, second = Head(stack, tmp_path), Head(stack, tmp_path)
    async with stack.up(), first.up() as leading:
        await async_wait_until(lambda: first.leader.leads)
        async with second.up():
            view = await first.submit(REQUEST, *"abcdefghij")
            await async_wait_until(lambda: gate.waiting == 8)
            assert not second.leader.leads
            leading.cancel()
            await async_wait_until(lambda: second.leader.leads, 5, what="the other to lead, in its long term")
            gate.open()
            view = await second.done(view.run_id)
    assert (view.state, view.accepted) == (RunState.ENDED, 20)
    assert second.places(view.run_id) == everything(10)
    assert sorted(ledger.accepted) == everything(10)  # nothing was begun twice


@pytest.mark.guarantee("G3")
async def test_g3_a_leader_that_is_followed_stops_at_once_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate, ledger = Gate(), WatchedLedger()
    stack = Stack(ledger=ledger, engine=Engine(gate))
    slow, quick = Head(stack, tmp_path), Head(stack, tmp_path)
    async with stack.up(), slow.up():
        view = await slow.submit(REQUEST, *"abcdefgh")
        await async_wait_until(lambda: gate.waiting == 8)
        ledger._offices[names.COORDINATOR_OFFICE] = "quick", ledger._clock() + 3600  # it stood still too long
        await async_wait_until(lambda: not slow.leader.leads)
        assert "stopped driving runs: another head leads now" in caplog.text
        ledger._offices.clear()
        async with quick.up():
            gate.open()
            await quick.done(view.run_id)
    assert quick.places(view.run_id) == everything(8)


async def test_a_leader_that_cannot_renew_stops_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = False

    class Away(MemoryLedger):
        async def lead(self, office: str, holder: str, term: float) -> bool:
            if away:
                raise LedgerError("Redis does not answer")
            return await super().lead(office, holder, term)

    gate = Gate()
    stack = Stack(ledger=Away(), engine=Engine(gate))
    head = Head(stack, tmp_path, term=0.2)
    async with stack.up(), head.up():
        view = await head.submit(REQUEST, *"abcd")
        await async_wait_until(lambda: gate.waiting == 8)
        away = True
        await async_wait_until(lambda: not head.leader.leads)
        assert "the ledger did not renew the office within 0.2 s" in caplog.text
        assert not is_being_written(RunFolder(head.folder / view.run_id).paths.run_dir)
        away = False
        gate.open()
        await head.done(view.run_id)
    assert head.places(view.run_id) == everything(4)


async def test_a_run_waits_for_the_workers_that_are_expected_and_says_for_how_many(tmp_path: Path) -> None:
    stack = Stack()
    head = Head(stack, tmp_path, expected=2)
    await stack.ledger.heartbeat("cpu", {"kind": "cpu"})
    async with stack.up(sweep=False), head.up():
        view = await head.submit(REQUEST, "a")
        await head.waits_for(view.run_id, "0 of 2 expected workers that generate are there")
        await stack.ledger.heartbeat("gpu-1", {"kind": "gpu"})
        await head.waits_for(view.run_id, "1 of 2 expected workers that generate is there")
        assert await stack.ledger.runs() == []
        await stack.ledger.heartbeat("gpu-2", {"kind": "gpu"})
        view = await head.done(view.run_id)
    assert (view.state, view.waiting_for) == (RunState.ENDED, None)


async def test_a_run_that_has_begun_waits_for_nobody(tmp_path: Path) -> None:
    stack = Stack()
    first = Head(stack, tmp_path)
    async with stack.up(sweep=False):
        async with first.up():
            view, _ = await first.runs.create(REQUEST)
            await first.runs.append(view.run_id, body("a"))
            await async_wait_until(lambda: len(first.places(view.run_id)) == 2)
        second = Head(stack, tmp_path, expected=2)
        async with second.up():
            await second.runs.close(view.run_id)
            assert (await second.done(view.run_id)).state is RunState.ENDED


@pytest.mark.parametrize("damage", ["rows", "manifest"])
async def test_a_run_that_fails_takes_no_other_down_and_is_tried_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    stack = Stack()
    head = Head(stack, tmp_path)
    broken = await head.submit(REQUEST, "a")
    folder = RunFolder(tmp_path / broken.run_id)
    path = folder.paths.rows if damage == "rows" else folder.paths.run_dir / "manifest.json"
    before = path.read_bytes() if path.exists() else b""
    path.write_bytes(b'{"no": "row"}\n')
    async with stack.up(), head.up():
        fine = await head.submit(REQUEST, "a")
        assert (await head.done(fine.run_id)).succeeded == 2
        await head.waits_for(broken.run_id, "it is tried again every")
        errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert errors
        assert all(broken.run_id in record.getMessage() and not record.exc_info for record in errors)
        path.write_bytes(before)
        view = await head.done(broken.run_id)
    assert (view.succeeded, view.waiting_for) == (2, None)


async def test_even_a_mistake_of_ours_takes_no_other_run_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stack = Stack()
    head = Head(stack, tmp_path)
    source = RunFolder.source
    broken = await head.submit(REQUEST, "a")

    def careless(folder: RunFolder, *arguments: Any) -> Any:
        return source(folder, *arguments) if folder.path.name != broken.run_id else 1 / 0

    monkeypatch.setattr(RunFolder, "source", careless)
    async with stack.up(), head.up():
        fine = await head.submit(REQUEST, "a")
        await head.done(fine.run_id)
        await head.waits_for(broken.run_id, "its coordinator failed (ZeroDivisionError: division by zero)")
        assert any(record.exc_info for record in caplog.records)


async def test_files_that_another_process_writes_are_waited_for(tmp_path: Path) -> None:
    stack = Stack()
    head = Head(stack, tmp_path)
    view = await head.submit(REQUEST, "a")
    run_dir = RunFolder(tmp_path / view.run_id).paths.run_dir
    other = await asyncio.create_subprocess_exec(
        "flock", str(run_dir / "lock"), "cat", stdin=asyncio.subprocess.PIPE
    )
    async with stack.up(), head.up():
        await head.waits_for(view.run_id, "another process is still writing its files")
        await other.communicate(b"")
        assert (await head.done(view.run_id)).succeeded == 2


async def test_with_groups_enough_an_open_run_ends(tmp_path: Path) -> None:
    stack = Stack()
    head = Head(stack, tmp_path)
    async with stack.up(), head.up():
        request = REQUEST.model_copy(update={"groups": GroupPolicy(wanted=3)})
        view, _ = await head.runs.create(request)
        await head.runs.append(view.run_id, body(*"abcdefgh"))
        view = await head.done(view.run_id)
    assert (view.state, view.groups.complete) == (RunState.ENDED, 3)


async def test_the_last_metrics_are_there_when_a_run_is_said_to_be_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if its leader dies just before."""
    stack = Stack()
    first = Head(stack, tmp_path)
    write = ProgressFile.write

    def dies(file: ProgressFile, look: Callable[[], Written]) -> None:
        if look().final:
            raise StorageError("killed")
        write(file, look)

    async with stack.up():
        with monkeypatch.context() as patches:
            patches.setattr(ProgressFile, "write", dies)
            async with first.up():
                view = await first.submit(REQUEST, "a", "b")
                await first.waits_for(view.run_id, "killed")
        assert first.metrics(view.run_id)["complete"] is True
        second = Head(stack, tmp_path)
        async with second.up():
            await second.done(view.run_id)
    metrics = second.metrics(view.run_id)
    assert (metrics["complete"], metrics["rollouts"]["accepted"]) == (True, 4)


async def test_metrics_so_far_are_there_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_queue.coordinator.driver._METRICS_INTERVAL", 0.01)
    stack = Stack()
    head = Head(stack, tmp_path)
    async with stack.up(), head.up():
        view, _ = await head.runs.create(REQUEST)
        await head.runs.append(view.run_id, body("a"))

        def shown() -> bool:
            path = head.folder / view.run_id / "rollouts.metrics.json"
            return path.exists() and head.metrics(view.run_id)["rollouts"]["succeeded"] == 2

        await async_wait_until(shown, what="metrics of an open run")
        assert head.metrics(view.run_id)["complete"] is False


async def test_a_folder_that_was_deleted_is_given_up(tmp_path: Path) -> None:
    stack = Stack()
    head = Head(stack, tmp_path)
    async with stack.up(), head.up():
        view, _ = await head.runs.create(REQUEST)
        await async_wait_until(partial(stack.ledger.run, view.run_id))
        (tmp_path / view.run_id).rename(tmp_path / "gone")
        fine = await head.submit(REQUEST, "a")
        await head.done(fine.run_id)


async def test_what_dead_heads_were_making_is_removed(tmp_path: Path) -> None:
    stack = Stack()
    head = Head(stack, tmp_path)
    old, new, keys = tmp_path / ".new-old", tmp_path / ".new-new", tmp_path / ".keys"
    for path in (old, new, keys):
        path.mkdir()
    key = keys / ".new-old"
    key.touch()
    for path in (old, key):
        os.utime(path, (0, 0))
    async with stack.up(), head.up():
        await async_wait_until(lambda: not old.exists() and not key.exists())
    assert new.exists()


async def test_a_progress_that_cannot_be_read_is_written_anew(tmp_path: Path) -> None:
    """As after a crash of the machine: it is not synced."""
    stack = Stack()
    head = Head(stack, tmp_path)
    async with stack.up():
        async with head.up():
            view, _ = await head.runs.create(REQUEST)
            await head.runs.append(view.run_id, body("a"))
            await async_wait_until(lambda: len(head.places(view.run_id)) == 2)
        run_dir = RunFolder(tmp_path / view.run_id).paths.run_dir
        (run_dir / "progress.json").write_bytes(b"\0" * 50)
        second = Head(stack, tmp_path)
        async with second.up():
            await async_wait_until(partial(_archived, second, view.run_id, 2))


async def _archived(head: Head, run_id: str, count: int) -> bool:
    return (await head.runs.show(run_id)).archived == count
