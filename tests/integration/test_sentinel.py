"""Real workers on a master that dies, and Sentinels that name another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.contract.redis_trouble import Sentinels
from tests.integration.fleet import IMPATIENT, Fleet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.timeout(45)


async def test_workers_and_beat_follow_a_failover(
    tmp_path: Path, unused_tcp_port_factory: Callable[[], int]
) -> None:
    ports = [unused_tcp_port_factory() for _ in range(3)]
    with Sentinels(tmp_path, ports) as sentinels:
        async with Fleet(sentinels.url, tmp_path, **IMPATIENT) as fleet:
            await fleet.start("gpu", "cpu", "beat")
            run = await fleet.submit([{"wait": True, "queued": True}, {}] * 20)
            await fleet.in_flight("gpu", 20)
            sentinels.kill_the_master()
            fleet.gate.touch()
            await fleet.collect(run, timeout=60)
            for name, process in fleet.processes.items():
                assert process.poll() is None
                assert fleet.log(name, containing="Traceback") == []
    assert {row.state for row in run.rows()} == {"succeeded"}
