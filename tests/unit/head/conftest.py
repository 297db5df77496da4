"""A head whose runs are played: its routes, its limits and its errors are real."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from starlette.testclient import TestClient

from gym_queue.fleet.registry import Registry
from gym_queue.head.app import create_app
from gym_queue.head.services import HeadServices
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.maintenance.survey import FleetMetrics
from gym_queue.settings import Settings
from tests.unit.head.played_head import HERE, PlayedRuns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from fastapi import FastAPI

    from gym_queue.records import Stage


class NoTickets:
    """A broker whose queues are empty."""

    async def depth(self, stage: Stage) -> int:
        return 0


class Nobody:
    """Takes tickets."""

    async def publish(self, tickets: object) -> None:
        """Do nothing with them."""


@pytest.fixture
def runs() -> PlayedRuns:
    return PlayedRuns()


@pytest.fixture
def ledger() -> MemoryLedger:
    return MemoryLedger()


@pytest.fixture
def make_app(runs: PlayedRuns, ledger: MemoryLedger, tmp_path: Path) -> Callable[..., FastAPI]:
    """Makes an app with these settings."""

    @asynccontextmanager
    async def played(settings: Settings) -> AsyncIterator[HeadServices]:
        registry = Registry(
            ledger,
            heartbeat_interval=settings.worker_heartbeat_interval,
            timeout=settings.worker_timeout,
        )
        metrics = FleetMetrics(ledger, NoTickets())
        services = HeadServices(settings, ledger, runs, registry, metrics, Nobody())  # type: ignore[arg-type]
        yield services
        services.readers.shutdown()

    def make(**settings: object) -> FastAPI:
        return create_app(Settings(runs_dir=str(tmp_path), **settings), played)  # type: ignore[arg-type]

    return make


@pytest.fixture
def client(make_app: Callable[..., FastAPI]) -> Iterator[TestClient]:
    """A client of a head without token, on this machine."""
    with TestClient(make_app(), HERE, raise_server_exceptions=False) as found:
        yield found
