"""Payloads by reference between real workers: what one writes another reads, or says why it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gym_queue.output import FailedRow
from tests.integration.fleet import Fleet

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

ROWS = [{"queued": 1}] * 6


def by_reference(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    monkeypatch.setenv("GYM_QUEUE_PAYLOAD_URL", str(folder / "payloads"))
    monkeypatch.setenv("GYM_QUEUE_PAYLOAD_THRESHOLD", "0")
    return folder / "payloads"


async def test_g5_what_one_worker_writes_another_reads(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    payloads = by_reference(monkeypatch, tmp_path)
    async with Fleet(redis_url, tmp_path) as fleet:
        await fleet.start("gpu1", "cpu1")
        run = await fleet.collect(await fleet.submit(ROWS))
        assert {row.state for row in run.rows()} == {"succeeded"}
        kinds = [path.name.split("-")[0] for path in payloads.glob("run-run/*-*")]
        assert sorted(set(kinds)) == ["example", "row", "trajectory"]
        assert len(kinds) == 3 * len(ROWS)
        await fleet.ledger.acknowledge("run", run.events[-1].position)
        assert [path.name for path in payloads.glob("run-run/*")] == ["about.json"]


async def test_g6_a_worker_without_the_setting_says_so_and_nothing_is_scored(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_reference(monkeypatch, tmp_path)
    async with Fleet(redis_url, tmp_path) as fleet:
        await fleet.start("gpu1")
        del fleet.variables["GYM_QUEUE_PAYLOAD_URL"]
        await fleet.start("cpu1")
        run = await fleet.collect(await fleet.submit(ROWS, limits={"max_attempts": 2}))
        said = (tmp_path / "cpu1.log").read_text()
    warnings = [line for line in said.splitlines() if "GYM_QUEUE_PAYLOAD_URL" in line and "WARNING" in line]
    assert len(warnings) in {1, 2}, "each child says it once"
    for event in run.events:
        row = FailedRow.model_validate_json(event.row)
        assert (row.state, row.failure_class) == ("failed", "infrastructure")
        assert row.error is not None
        assert "GYM_QUEUE_PAYLOAD_URL is not set here" in row.error
