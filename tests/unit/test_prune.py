"""The sweep deletes payloads of runs that nobody knows any more, and no others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gym_queue.ledger.by_reference import ByReference
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.ledger.payloads import Payloads
from gym_queue.maintenance import prune as prune_module
from gym_queue.maintenance.prune import prune
from gym_queue.maintenance.sweep import sweep
from gym_queue.settings import Settings
from tests.unit.road import RUN, run_spec
from tests.unit.silent_fleet import Fleet
from tests.unit.test_sweep import Post

if TYPE_CHECKING:
    from pathlib import Path


class DyingLedger(MemoryLedger):
    """Whoever forgets a run dies right after."""

    async def forget_run(self, run_id: str) -> None:
        await super().forget_run(run_id)
        raise KeyboardInterrupt


@pytest.fixture
def payloads(tmp_path: Path) -> Payloads:
    return Payloads(str(tmp_path), "mine")


@pytest.fixture
def old_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_module, "_OLD", 0.0)


@pytest.mark.usefixtures("old_at_once")
async def test_payloads_of_a_run_that_was_half_forgotten_go(payloads: Payloads) -> None:
    inner = DyingLedger()
    ledger = ByReference(inner, payloads, 0)
    await ledger.open_run(run_spec(), RUN)
    await ledger.open_run(run_spec(run_id="run-2"), "run-2")
    assert await prune(ledger, payloads) == 0
    with pytest.raises(KeyboardInterrupt):
        await ledger.forget_run(RUN)
    assert payloads.opened_before(0.0) == [RUN, "run-2"]
    assert await prune(ledger, payloads) == 1
    assert payloads.opened_before(0.0) == ["run-2"]


async def test_a_young_folder_may_belong_to_a_run_that_is_being_opened(payloads: Payloads) -> None:
    payloads.open(RUN)
    assert await prune(MemoryLedger(), payloads) == 0
    assert payloads.opened_before(0.0) == [RUN]


@pytest.mark.usefixtures("old_at_once")
async def test_runs_of_another_ledger_are_left_alone(payloads: Payloads, tmp_path: Path) -> None:
    Payloads(str(tmp_path), "theirs").open(RUN)
    assert await prune(MemoryLedger(), payloads) == 0
    assert (tmp_path / f"run-{RUN}").exists()


async def test_without_payloads_there_is_nothing_to_do() -> None:
    assert await prune(MemoryLedger(), None) == 0


@pytest.mark.usefixtures("old_at_once")
async def test_the_sweep_does_it(payloads: Payloads) -> None:
    payloads.open(RUN)
    fleet = Fleet()
    await sweep(fleet.ledger, Post(fleet), Settings(), payloads)
    assert payloads.opened_before(0.0) == []
