"""``GET /metrics`` of a head: the ledger's facts, for Prometheus."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from gym_queue.telemetry.exposition import CONTENT_TYPE
from tests.unit.prometheus import samples

if TYPE_CHECKING:
    from starlette.testclient import TestClient

    from gym_queue.ledger.memory import MemoryLedger


def test_a_head_shows_the_fleet(client: TestClient, ledger: MemoryLedger) -> None:
    asyncio.run(ledger.heartbeat("gpu-1", {"kind": "gpu", "slots": "8", "used": "3"}))
    answer = client.get("/metrics")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, CONTENT_TYPE)
    shown = samples(answer.content)
    assert shown["gym_queue_workers{kind=gpu}"] == 1
    assert shown["gym_queue_slots{kind=gpu,state=free}"] == 5
    assert shown["gym_queue_ledger_up"] == shown["gym_queue_broker_up"] == 1
