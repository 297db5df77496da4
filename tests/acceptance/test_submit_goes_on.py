"""Real commands whose parts die: each rollout ends once, and ``--resume`` goes on where a command stopped."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from gym_queue.testing import wait_until
from tests.acceptance.commands import check_each_once, children, metrics, running, submitted, write_input

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLES, SAMPLES = 20, 3
# Slow enough to be caught in the middle: 60 rollouts, 4 at a time.
ARGUMENTS = ["--model", "stub:?delay=0.2", "--samples", str(SAMPLES), "--concurrency", "4"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_input(tmp_path, [{"prompt": f"{number}?", "answer": "ok"} for number in range(EXAMPLES)])
    return tmp_path


def check_whole(folder: Path) -> None:
    """Every rollout is there, once, in order, and the metrics say so too."""
    rows = check_each_once(folder, EXAMPLES, SAMPLES)
    places = [(row["example_index"], row["sample_index"]) for row in rows]
    assert places == sorted(places)
    assert (folder / "out.failures.jsonl").read_text() == ""
    found = metrics(folder)
    assert found["complete"] is True
    assert found["rollouts"]["succeeded"] == EXAMPLES * SAMPLES


def test_ctrl_c_and_resume(folder: Path) -> None:
    with submitted(folder, *ARGUMENTS) as command:
        command.reach(5)
        below = children(command.process.pid)
        command.process.send_signal(signal.SIGINT)
        assert command.end(60) == 130
    assert command.said.rstrip().endswith("--concurrency 4 --resume")
    assert not any(running(pid) for pid in below), "the stack is down"
    assert metrics(folder)["complete"] is False
    before = (folder / "out.jsonl").read_bytes()
    assert before.count(b"\n") < EXAMPLES * SAMPLES
    with submitted(folder, *ARGUMENTS, "--resume") as command:
        assert command.end() == 0, command.said
    check_whole(folder)
    assert set(before.splitlines()) <= set((folder / "out.jsonl").read_bytes().splitlines()), "rows are kept"


@pytest.mark.guarantee("G9")
def test_kill_9_and_resume(folder: Path) -> None:
    with submitted(folder, *ARGUMENTS) as command:
        command.reach(5)
        below = children(command.process.pid)
        assert any("redis-server" in argv for argv in below.values())
        assert sum("celery" in argv for argv in below.values()) >= 4, "gpu, cpu and its child, beat"
        command.process.kill()
        command.process.wait()
        wait_until(lambda: not any(running(pid) for pid in below), what="the stack to follow")
    with submitted(folder, *ARGUMENTS, "--resume") as command:
        assert command.end() == 0, command.said
    check_whole(folder)


@pytest.mark.guarantee("G3")
@pytest.mark.parametrize("victim", ["workers.gpu", "workers.cpu", "redis-server", "beat beat"])
def test_the_run_survives_kill_9_of_any_part(folder: Path, victim: str) -> None:
    with submitted(folder, *ARGUMENTS) as command:
        command.reach(5)
        [pid, *_] = [pid for pid, argv in children(command.process.pid).items() if victim in argv]
        os.kill(pid, signal.SIGKILL)
        assert command.end() == 0, command.said
    assert "was killed by SIGKILL" in command.said
    check_whole(folder)
