"""What is wished of a run holds, whoever leads and whatever the ledger forgets."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from gym_queue.api import RunRequest
from gym_queue.records import RunState
from gym_queue.testing import async_wait_until
from tests.unit.heads import Head, hurry_leaders
from tests.unit.road import Engine, Gate
from tests.unit.small_stack import Stack, WatchedLedger
from tests.unit.test_inbox import body

if TYPE_CHECKING:
    from pathlib import Path

    from gym_queue.ledger.memory import MemoryLedger


REQUEST = RunRequest(model="stub:", samples=2)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry_leaders(monkeypatch)


async def test_paused_stays_paused_whoever_leads_and_whatever_the_ledger_forgets(tmp_path: Path) -> None:
    ledger = WatchedLedger()
    stack = Stack(ledger=ledger)
    head = Head(stack, tmp_path)
    async with stack.up():
        view, _ = await head.runs.create(REQUEST)
        await head.runs.pause(view.run_id)
        async with head.up():
            await head.runs.append(view.run_id, body("a", "b"))
            await async_wait_until(partial(ledger.run, view.run_id), what="the run to be taken up")
            await ledger.forget_run(view.run_id)
            await async_wait_until(partial(_is_paused, ledger, view.run_id), what="it to be paused again")
        second = Head(stack, tmp_path)
        async with second.up():
            await async_wait_until(partial(_is_paused, ledger, view.run_id))
            before = ledger.looks
            await async_wait_until(lambda: ledger.looks > before + 3, what="the feeder to look")
            started = len(ledger.accepted)
            await second.runs.close(view.run_id)
            await second.runs.resume(view.run_id)
            view = await second.done(view.run_id)
    assert started == 0
    assert (view.state, view.succeeded) == (RunState.ENDED, 4)


async def _is_paused(ledger: MemoryLedger, run_id: str) -> bool:
    status = await ledger.run(run_id)
    return status is not None and status.state is RunState.PAUSED


async def test_a_run_paused_in_the_ledger_alone_stays_so(tmp_path: Path) -> None:
    """As ``gym-queue runs pause`` does it."""
    gate, ledger = Gate(), WatchedLedger()
    stack = Stack(ledger=ledger, engine=Engine(gate))
    async with stack.up():
        for head in (Head(stack, tmp_path), Head(stack, tmp_path)):
            async with head.up():
                if not gate.waiting:
                    view = await head.submit(REQUEST, *"abcdefgh")
                    await async_wait_until(lambda: gate.waiting == 8)
                    await ledger.set_run_state(view.run_id, RunState.PAUSED)
                    gate.open()
                await async_wait_until(partial(_looked, ledger, ledger.looks + 3))
                shown = await head.runs.show(view.run_id)
                assert (shown.state, shown.accepted) == (RunState.PAUSED, 8)


def _looked(ledger: WatchedLedger, times: int) -> bool:
    return ledger.looks > times


async def test_a_run_cancelled_before_it_began_ends_without_workers(tmp_path: Path) -> None:
    ledger = WatchedLedger()
    stack = Stack(ledger=ledger)
    head = Head(stack, tmp_path, expected=5)
    async with stack.up(), head.up():
        view = await head.submit(REQUEST, "a", "b")
        await head.waits_for(view.run_id, "expected workers")
        await head.runs.cancel(view.run_id)
        view = await head.done(view.run_id)
    assert (view.state, view.accepted, ledger.accepted) == (RunState.CANCELLED, 0, [])
    assert head.metrics(view.run_id)["complete"] is False


@pytest.mark.parametrize("forgets", [False, True])
async def test_a_run_cancelled_in_its_middle_ends_even_if_the_ledger_forgets(
    tmp_path: Path, *, forgets: bool
) -> None:
    gate, ledger = Gate(), WatchedLedger()
    stack = Stack(ledger=ledger, engine=Engine(gate))
    head = Head(stack, tmp_path)
    async with stack.up(), head.up():
        view, _ = await head.runs.create(REQUEST)
        await head.runs.append(view.run_id, body(*"abcdefgh"))
        await async_wait_until(lambda: gate.waiting == 8)
        if forgets:
            await ledger.forget_run(view.run_id)
        await head.runs.cancel(view.run_id)
        view = await head.done(view.run_id)
        gate.open()
    assert (view.state, view.succeeded, view.closed) == (RunState.CANCELLED, 0, True)
    assert view.cancelled == len(head.places(view.run_id)) == view.accepted
