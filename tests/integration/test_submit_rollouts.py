"""``submit-rollouts`` from flags to files and exit status, with the stack and the coordinator played.

Input, output, manifest, metrics and signals are real.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import TYPE_CHECKING

import pytest

from gym_queue import assembly
from gym_queue.cli import execution
from gym_queue.coordinator.run import Cancelled, Interrupted
from gym_queue.errors import LedgerError, StackError, StorageError
from gym_queue.ledger.memory import MemoryLedger
from tests.integration.played_stack import FakeCoordinator, FakeStack, play, rows, submit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path


@pytest.fixture(autouse=True)
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(tmp_path, monkeypatch)


def test_a_run_that_succeeds(tmp_path: Path) -> None:
    result = submit()
    assert result.exit_code == 0, result.output
    assert "3 examples x 2 samples with stub:; logs are in out.run/logs" in result.stderr
    assert result.stdout.startswith("6 rollouts: 6 succeeded, 0 failed\nmean reward 0.5000 ± ")
    assert "pass@1 0.5000, pass@2 1.0000\n" in result.stdout
    assert result.stdout.endswith("rollouts: out.jsonl\nmetrics:  out.metrics.json\n")
    assert [(row["example_index"], row["sample_index"]) for row in rows(tmp_path / "out.jsonl")] == [
        (example, sample) for example in range(3) for sample in range(2)
    ]
    assert {row["colour"] for row in rows(tmp_path / "out.jsonl")} == {"red"}
    metrics = json.loads((tmp_path / "out.metrics.json").read_text())
    assert metrics["complete"] is True
    assert metrics["reward"]["mean"] == 0.5
    assert not (tmp_path / "out.run" / "redis").exists(), "its records are in the files"
    manifest = json.loads((tmp_path / "out.run" / "manifest.json").read_text())
    assert manifest["command"] == ["in.jsonl", "--model", "stub:", "--samples", "2", "-o", "out.jsonl"]


def test_some_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCoordinator, "failing", {1, 4})
    result = submit()
    assert result.exit_code == 1
    assert "6 rollouts: 4 succeeded, 2 failed" in result.stdout
    assert "2 failed by verifier, such as: no idea at all" in result.stdout
    assert "failures: out.failures.jsonl" in result.stdout


def test_some_were_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCoordinator, "cancelling", {1, 4})
    result = submit()
    assert result.exit_code == 1
    assert "6 rollouts: 4 succeeded, 0 failed, 2 cancelled" in result.stdout


def test_ctrl_c_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait_for_ctrl_c(coordinator: FakeCoordinator) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await coordinator.interrupted.wait()
        raise Interrupted

    monkeypatch.setattr(FakeCoordinator, "stop_after", 3)
    monkeypatch.setattr(FakeCoordinator, "then", wait_for_ctrl_c)
    result = submit("--seed", "7")
    assert result.exit_code == 130
    assert "rollouts in flight have 10 s to end (Ctrl-C again stops at once)" in result.stderr
    continuation = "submit-rollouts in.jsonl --model stub: --samples 2 -o out.jsonl --seed 7 --resume"
    assert "3 of 6 rollouts are in out.jsonl and out.failures.jsonl" in result.stderr
    assert result.stderr.endswith(f"Go on with: {continuation}\n")
    assert json.loads((tmp_path / "out.metrics.json").read_text())["complete"] is False
    run_id = rows(tmp_path / "out.jsonl")[0]["run_id"]

    monkeypatch.setattr(FakeCoordinator, "then", None)
    result = submit("--seed", "7", "--resume")
    assert result.exit_code == 0, result.output
    assert "6 rollouts: 6 succeeded" in result.stdout
    assert len(rows(tmp_path / "out.jsonl")) == 6
    assert {row["run_id"] for row in rows(tmp_path / "out.jsonl")} == {run_id}


def test_ctrl_c_twice_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never_end(coordinator: FakeCoordinator) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await coordinator.interrupted.wait()
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    monkeypatch.setattr(FakeCoordinator, "stop_after", 1)
    monkeypatch.setattr(FakeCoordinator, "then", never_end)
    result = submit()
    assert result.exit_code == 130
    assert "1 of 6 rollouts are in out.jsonl" in result.stderr


def test_ctrl_c_while_the_stack_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStack, "never_ready", True)
    result = submit()
    assert result.exit_code == 130
    assert "0 of 6 rollouts" in result.stderr


def test_a_finished_run_is_only_summed_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert submit().exit_code == 0
    monkeypatch.setattr(execution, "EmbeddedStack", None)
    result = submit("--resume")
    assert result.exit_code == 0, result.output
    assert "6 rollouts: 6 succeeded, 0 failed" in result.stdout


def test_a_full_disk_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(_: FakeCoordinator) -> None:
        msg = "out.jsonl cannot be written: No space left on device"
        raise StorageError(msg)

    monkeypatch.setattr(FakeCoordinator, "stop_after", 2)
    monkeypatch.setattr(FakeCoordinator, "then", full)
    result = submit()
    assert result.exit_code == 1
    assert "No space left on device; nothing that had ended is lost: 2 of 6 rollouts" in result.stderr
    assert "--resume" in result.stderr
    monkeypatch.setattr(FakeCoordinator, "then", None)
    assert submit("--resume").exit_code == 0


def test_a_cancelled_run_says_so_and_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cancelled(_: FakeCoordinator) -> None:
        raise Cancelled

    monkeypatch.setattr(FakeCoordinator, "stop_after", 2)
    monkeypatch.setattr(FakeCoordinator, "then", cancelled)
    result = submit()
    assert result.exit_code == 1
    assert result.stdout.startswith("2 rollouts: 2 succeeded, 0 failed\n")
    assert "submit-rollouts: cancelled: 2 of 6 rollouts are in out.jsonl" in result.stderr
    assert result.stderr.endswith("-o out.jsonl --resume\n")
    metrics = json.loads((tmp_path / "out.metrics.json").read_text())
    assert (metrics["complete"], metrics["rollouts"]["accepted"]) == (False, 2)
    monkeypatch.setattr(FakeCoordinator, "then", None)
    assert submit("--resume").exit_code == 0


@pytest.mark.parametrize("away", [False, True])
def test_a_shared_ledger_forgets_a_run_that_turns_out_to_be_complete(
    monkeypatch: pytest.MonkeyPatch,
    away: bool,  # noqa: FBT001
) -> None:
    """Its coordinator may have died between the last row and that."""
    forgotten: list[str] = []

    class Ledger(MemoryLedger):
        async def forget_run(self, run_id: str) -> None:
            forgotten.append(run_id)
            if away:
                raise LedgerError

    monkeypatch.setenv("GYM_QUEUE_REDIS_URL", "redis://elsewhere:6379/0")
    assert submit().exit_code == 0
    monkeypatch.setattr(assembly, "make_ledger", lambda _: Ledger())
    assert submit("--resume").exit_code == 0
    assert len(forgotten) == 1


def test_a_stack_that_breaks_down_during_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait(_: FakeCoordinator) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(FakeStack, "trouble", StackError("gpu1 keeps dying"))
    monkeypatch.setattr(FakeCoordinator, "stop_after", 0)
    monkeypatch.setattr(FakeCoordinator, "then", wait)
    result = submit()
    assert result.exit_code == 1
    assert "gpu1 keeps dying; nothing that had ended is lost" in result.stderr


def test_a_stack_that_does_not_start_is_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStack, "__aenter__", _raising(StackError("no redis-server was found")))
    result = submit()
    assert result.exit_code == 2
    assert result.stderr.endswith("submit-rollouts: no redis-server was found\n")


def _raising(error: Exception) -> Callable[..., Awaitable[None]]:
    async def enter(_: object) -> None:
        raise error

    return enter
