"""The window follows the fleet, unless it was set (G5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gym_queue.coordinator.window import AHEAD, Window
from gym_queue.errors import LedgerError
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.settings import Settings

if TYPE_CHECKING:
    from gym_queue.ledger.base import Lease


@pytest.fixture(autouse=True)
def _always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_queue.coordinator.window._REFRESH_INTERVAL", 0.0)


async def fleet(gpus: int, slots: int) -> MemoryLedger:
    ledger = MemoryLedger()
    for number in range(gpus):
        await ledger.heartbeat(f"gpu-{number}", {"kind": "gpu", "slots": str(slots)})
    await ledger.heartbeat("cpu-1", {"kind": "cpu", "slots": "100"})
    return ledger


@pytest.mark.parametrize(
    ("gpus", "slots", "window"), [(0, 256, 100 + AHEAD), (1, 1, 101 + AHEAD), (200, 256, 51_300 + 12_800)]
)
async def test_the_window_holds_what_fits_the_slots_and_some_more(gpus: int, slots: int, window: int) -> None:
    assert await Window(await fleet(gpus, slots), None).size() == window


async def test_slots_that_generate_are_busy_while_all_that_verify_are() -> None:
    ledger = await fleet(10, 100)
    await ledger.heartbeat("cpu-2", {"kind": "cpu", "slots": "50000"})
    assert await Window(ledger, None).size() > 1000 + 50_000


async def test_the_window_grows_and_shrinks_with_the_fleet() -> None:
    ledger = await fleet(2, 1000)
    window = Window(ledger, None)
    before = await window.size()
    await ledger.heartbeat("gpu-new", {"kind": "gpu", "slots": "1000"})
    assert await window.size() == before + 1000
    await ledger.drop_lease("gpu-new")
    assert await window.size() == before


async def test_a_run_may_begin_before_the_fleet_is_known() -> None:
    window = Window(await fleet(200, 256), None, first=AHEAD)
    assert [await window.size() for _ in range(3)] == [AHEAD, 64_100, 64_100]


async def test_leases_are_not_asked_for_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_queue.coordinator.window._REFRESH_INTERVAL", 3600.0)
    ledger = await fleet(10, 256)
    window = Window(ledger, None)
    before = await window.size()
    await ledger.heartbeat("gpu-new", {"kind": "gpu", "slots": "1000"})
    assert await window.size() == before


async def test_a_number_that_is_set_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().window is None
    monkeypatch.setenv("GYM_QUEUE_WINDOW", "7")
    assert await Window(await fleet(200, 256), Settings().window).size() == 7


async def test_a_claim_before_the_first_heartbeat_leaves_a_lease_without_facts() -> None:
    ledger = await fleet(3, 1000)
    await ledger.heartbeat("someone", {})
    await ledger.heartbeat("young", {"kind": "gpu"})
    assert await Window(ledger, None).size() == 3100 + AHEAD


async def test_that_nobody_generates_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    ledger = await fleet(0, 0)
    window = Window(ledger, None)
    for _ in range(3):
        await window.size()
    assert caplog.text.count("no worker that generates is there") == 1
    await ledger.heartbeat("gpu", {"kind": "gpu", "slots": "1"})
    await window.size()
    await ledger.drop_lease("gpu")
    await window.size()
    assert caplog.text.count("no worker that generates is there") == 2


async def test_a_ledger_that_is_away_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_queue.coordinator.patience._FIRST_PAUSE", 0.0)
    ledger = await fleet(10, 1000)
    answer, troubles = ledger.leases, [LedgerError(), LedgerError()]

    async def sometimes() -> list[Lease]:
        if troubles:
            raise troubles.pop()
        return await answer()

    monkeypatch.setattr(ledger, "leases", sometimes)
    assert await Window(ledger, None).size() == 10_100 + 2500
