"""The caretaker between a worker and its ledger: whom a sweep may give up, and when it may not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from gym_queue import assembly
from gym_queue.errors import LedgerError
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.maintenance import prune
from gym_queue.settings import Settings
from gym_queue.testing import async_wait_until
from gym_queue.worker import caretaker
from gym_queue.worker.caretaker import Caretaker

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from gym_queue.ledger.base import Lease
    from gym_queue.pipeline import Attempt
    from gym_queue.records import Fence, Stage, Ticket


class Ledger(MemoryLedger):
    """Waits, or fails, while it is away: patient and impatient callers share it."""

    def __init__(self) -> None:
        super().__init__()
        self.there = asyncio.Event()
        self.there.set()
        self.beats: dict[str, int] = {}
        self.asked_for_leases = 0

    async def heartbeat(self, worker: str, info: dict[str, str]) -> bool:
        if not self.there.is_set():
            raise LedgerError
        self.beats[worker] = self.beats.get(worker, 0) + 1
        return await super().heartbeat(worker, info)

    async def revoked(self, worker: str, limit: int) -> list[Fence]:
        if not self.there.is_set():
            raise LedgerError
        return await super().revoked(worker, limit)

    async def leases(self) -> list[Lease]:
        self.asked_for_leases += 1
        await self.there.wait()
        return await super().leases()


class Broker:
    async def publish(self, tickets: Sequence[Ticket]) -> None:
        """Nothing is published here."""

    async def depth(self, stage: Stage) -> int:
        return 0

    async def close(self) -> None:
        """There is nothing to close."""


class Ward:
    name = "me"
    app = None
    settings = Settings(worker_heartbeat_interval=0.01, worker_timeout=0.5)

    def running(self) -> list[Attempt]:
        return []

    def drop(self, fences: Sequence[Fence]) -> None:
        """There is nothing to drop."""

    def info(self) -> dict[str, str]:
        return {}


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    ledger = Ledger()
    monkeypatch.setattr(assembly, "make_ledger", lambda _settings, **_: ledger)
    monkeypatch.setattr(assembly, "make_broker", lambda _settings: Broker())
    for name, seconds in {"_TICK": 0.02, "_IN_TOUCH": 0.3, "_SETTLING": 1.0, "_GLANCE": 0.05}.items():
        monkeypatch.setattr(caretaker, name, seconds)
    return ledger


@pytest.fixture
def carer(ledger: Ledger) -> Iterator[Caretaker]:
    carer = Caretaker(Ward())
    carer.start()
    yield carer
    assert ledger.there.is_set()
    carer.stop()


async def in_touch(ledger: Ledger) -> None:
    beats = ledger.beats.get("me", 0)
    await async_wait_until(lambda: ledger.beats.get("me", 0) > beats + 1, what="the lease to be renewed")


async def alive(ledger: Ledger) -> set[str]:
    return {lease.worker for lease in await MemoryLedger.leases(ledger)}


async def test_a_worker_that_is_silent_is_given_up(ledger: Ledger, carer: Caretaker) -> None:
    await ledger.heartbeat("silent", {})

    async def given_up() -> bool:
        carer.sweep()
        return await alive(ledger) == {"me"}

    await in_touch(ledger)
    await async_wait_until(given_up, what="the silent one to be given up")


async def test_payloads_of_forgotten_runs_go(
    ledger: Ledger, carer: Caretaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune, "_OLD", 0.0)
    monkeypatch.setattr(Ward, "settings", Ward.settings.model_copy(update={"payload_url": str(tmp_path)}))
    payloads = assembly.make_payloads(Ward.settings)
    assert payloads is not None
    payloads.open("run")

    def gone() -> bool:
        carer.sweep()
        return payloads.opened_before(0.0) == []

    await in_touch(ledger)
    await async_wait_until(gone, what="the run's payloads to be deleted")


async def test_an_outage_gives_nobody_up(ledger: Ledger, carer: Caretaker) -> None:
    """Neither a sweep that was under way when it began, nor one that is asked for at its end."""
    await in_touch(ledger)
    await ledger.heartbeat("other", {})
    ledger.there.clear()
    carer.sweep()
    await async_wait_until(lambda: ledger.asked_for_leases, what="a sweep that waits for the ledger")
    await asyncio.sleep(2 * Ward.settings.worker_timeout)  # nobody can renew; it is about time
    carer._loop.call_soon_threadsafe(ledger.there.set)
    await in_touch(ledger)
    carer.sweep()
    await in_touch(ledger)
    assert await alive(ledger) == {"me", "other"}

    async def given_up() -> bool:
        carer.sweep()
        return await alive(ledger) == {"me"}

    await async_wait_until(given_up, what="the other to be given up: it is still silent, and all has settled")


async def test_who_leaves_gives_up_its_lease(ledger: Ledger, carer: Caretaker) -> None:
    await in_touch(ledger)
    await asyncio.to_thread(carer.stop)
    assert await alive(ledger) == set()
