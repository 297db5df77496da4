"""Heads that die, lose the office, the ledger's answers and what it knew, at random (G1, G3, G8)."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue import names
from gym_queue.api import RunRequest
from gym_queue.coordinator.inbox import standing
from gym_queue.coordinator.runs import known_runs
from gym_queue.errors import LedgerError
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.records import RunState
from tests.unit.heads import Head, hurry_leaders
from tests.unit.small_stack import FlakyLedger, Stack, everything
from tests.unit.test_inbox import named

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

REQUEST = RunRequest(model="stub:", samples=2)
KEY = "one run"
EXAMPLES, BATCH = 60, 5


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry_leaders(monkeypatch)


async def insist(call: Callable[[], Awaitable[Any]]) -> Any:
    """Do as a client does: repeat what was not answered."""
    while True:
        try:
            return await call()
        except LedgerError:
            await asyncio.sleep(0)


async def client(heads: list[Head], chance: random.Random) -> str:
    """Make a run and feed it, each call through any head, and some of them twice."""

    async def somewhere(name: str, *arguments: Any) -> Any:
        answers = [
            await insist(lambda: getattr(chance.choice(heads).runs, name)(*arguments))
            for _ in range(chance.choice((1, 2)))
        ]
        return answers[-1]

    view, _ = await somewhere("create", REQUEST, KEY)
    for start in range(0, EXAMPLES, BATCH):
        rows = named(*(f"e{start + number}" for number in range(BATCH)))
        assert await somewhere("append", view.run_id, rows, start) == start + BATCH
        if chance.random() < 0.3:
            assert (await somewhere("pause", view.run_id)).state is RunState.PAUSED
            await somewhere("resume", view.run_id)
        await asyncio.sleep(chance.random() * 0.05)
    await somewhere("close", view.run_id)
    run_id: str = view.run_id
    return run_id


async def trouble(
    ledger: MemoryLedger, leading: list[asyncio.Task[None]], heads: list[Head], chance: random.Random
) -> None:
    """Hurt something now and then."""
    folder = heads[0].folder
    while True:
        await asyncio.sleep(chance.random() * 0.05)
        match chance.choice(("death", "office", "memory")):
            case "death":
                which = chance.randrange(len(heads))
                leading[which].cancel()
                await asyncio.gather(leading[which], return_exceptions=True)
                leading[which] = asyncio.create_task(heads[which].leader.run())
            case "office":
                ledger._offices[names.COORDINATOR_OFFICE] = "a ghost", ledger._clock() + 0.02
            case "memory":
                for run_id in known_runs(folder):
                    await ledger.forget_run(run_id)


@pytest.mark.guarantee("G1", "G3", "G8")
@pytest.mark.parametrize("seed", range(4))
async def test_whatever_befalls_the_heads_each_rollout_is_there_once(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    stack = Stack()
    assert isinstance(stack.ledger, MemoryLedger)
    flaky: Any = FlakyLedger(stack.ledger, chance, 0.02)
    heads = [Head(stack, tmp_path, term=0.2, ledger=flaky) for _ in range(3)]
    leading = [asyncio.create_task(head.leader.run()) for head in heads]
    async with stack.up():
        hurt = asyncio.create_task(trouble(stack.ledger, leading, heads, chance))
        run_id = await client(heads, chance)
        hurt.cancel()
        await asyncio.gather(hurt, return_exceptions=True)
        view = await insist(partial(heads[0].done, run_id))
    for task in leading:
        task.cancel()
    await asyncio.gather(*leading, return_exceptions=True)
    for head in heads:
        head.runs.close_threads()
    assert known_runs(tmp_path) == [run_id]
    assert standing(tmp_path / run_id).rows == EXAMPLES
    assert heads[0].places(run_id) == everything(EXAMPLES)
    assert (view.state, view.accepted, view.groups.complete) == (RunState.ENDED, 2 * EXAMPLES, EXAMPLES)
    assert heads[0].metrics(run_id)["complete"] is True
