"""Real commands whose examples, trajectories and rows all travel by reference (G5)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.testing import wait_until
from tests.acceptance.commands import (
    Command,
    check_each_once,
    children,
    metrics,
    running,
    submitted,
    write_input,
)

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLES, SAMPLES = 12, 3
SLOW = ["--model", "stub:?text=4&delay=0.2", "--samples", str(SAMPLES), "--concurrency", "4"]
ALL: dict[str, Any] = {"GYM_QUEUE_PAYLOAD_THRESHOLD": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    row = {"prompt": "2 + 2?", "answer": "4", "verifier": "math_verify"}  # which is not inline
    write_input(tmp_path, [row] * EXAMPLES)
    return tmp_path


def kept(folder: Path, kind: str) -> list[Path]:
    return [*folder.glob(f"out.run/payloads/run-*/{kind}-*")]


def under_way(command: Command) -> None:
    """Wait until there is a payload of each kind, and rows in the output."""
    command.reach(5)
    for kind in ("example", "trajectory", "row"):
        wait_until(partial(kept, command.folder, kind), 60, what=f"a {kind} by reference")


def test_a_run_by_reference_leaves_its_output_only(folder: Path) -> None:
    with submitted(folder, *SLOW, **ALL) as command:
        under_way(command)
        assert command.end() == 0, command.said
    check_each_once(folder, EXAMPLES, SAMPLES)
    assert metrics(folder)["rollouts"]["succeeded"] == EXAMPLES * SAMPLES
    assert not (folder / "out.run" / "payloads").exists()


def test_g9_what_went_by_reference_is_there_when_the_command_is_resumed(folder: Path) -> None:
    with submitted(folder, *SLOW, **ALL) as command:
        under_way(command)
        below = children(command.process.pid)
        command.process.kill()
        wait_until(lambda: not any(running(pid) for pid in below), what="the stack to follow")
    assert kept(folder, "example")
    with submitted(folder, *SLOW, "--resume", **ALL) as command:
        assert command.end() == 0, command.said
    rows = check_each_once(folder, EXAMPLES, SAMPLES)
    assert {row["state"] for row in rows} == {"succeeded"}
    assert not (folder / "out.run" / "payloads").exists()
