"""What a worker says of itself when somebody asks whether it can work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gym_queue.settings import Settings
from gym_queue.worker import shutdown
from gym_queue.worker.port import WorkerPort
from tests.unit.prometheus import shown


def worker(kind: str = "gpu", *, silence: float | None = 1.0, connected: bool = True) -> Any:
    return SimpleNamespace(
        kind=kind,
        name=f"{kind}-1",
        settings=Settings(worker_timeout=300.0),
        caretaker=SimpleNamespace(silence=silence),
        consumer=SimpleNamespace(is_connected=connected),
        pool=SimpleNamespace(limit=4, used=5),
    )


@pytest.mark.parametrize(
    ("asked", "trouble"),
    [
        (worker(), []),
        (worker(silence=299.0), []),
        (worker(silence=None), ["it has no lease yet"]),
        (worker(silence=301.0), ["its lease was not renewed for 301 s (WORKER_TIMEOUT is 300)"]),
        (worker(connected=False), ["the broker is not connected"]),
    ],
)
def test_it_is_ready_or_says_why_not(asked: Any, trouble: list[str]) -> None:
    port = WorkerPort(asked)
    assert port.trouble() == trouble
    assert shown(port.families())["gym_queue_ready{role=gpu}"] == (not trouble)


def test_before_it_has_met_the_broker_it_is_not_ready_and_shows_what_it_knows() -> None:
    asked = worker(silence=None)
    asked.consumer = asked.pool = None
    port = WorkerPort(asked)
    assert port.trouble() == ["the broker is not connected", "it has no lease yet"]
    numbers = shown(port.families())
    assert "gym_queue_worker_lease_age_seconds" not in numbers
    assert not [name for name in numbers if name.startswith("gym_queue_worker_slots")]


def test_one_that_was_told_to_end_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutdown, "_times", 1)
    assert WorkerPort(worker()).trouble() == ["it was told to end"]


def test_a_worker_that_holds_more_than_its_slots_has_none_free() -> None:
    numbers = shown(WorkerPort(worker("cpu")).families())
    assert numbers["gym_queue_worker_slots{state=used}"] == 5
    assert numbers["gym_queue_worker_slots{state=free}"] == 0
    assert numbers["gym_queue_worker_lease_age_seconds"] == 1.0
