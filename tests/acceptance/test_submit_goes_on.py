"""Real commands whose parts die: each rollout ends once, and ``--resume`` goes on where a command stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
EXAMPLES, SAMPLES = 20, 3
# Slow enough to be caught in the middle: 60 rollouts, 4 at a time.
COMMAND = [
    sys.executable, "-m", "gym_queue.cli.submit", "in.jsonl", "--model", "stub:?delay=0.2",
    "--samples", str(SAMPLES), "--concurrency", "4", "-o", "out.jsonl",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"prompt": f"{number}?", "answer": "ok"} for number in range(EXAMPLES)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@contextmanager
def submitted(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start the command; make sure that it is gone in the end."""
    dropped = ("GYM_QUEUE_REDIS_URL", "HEAD_SERVER_URL")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    command = subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield command
    finally:
        command.kill()
        command.communicate()


def in_the_middle(folder: Path, command: subprocess.Popen[str]) -> None:
    """Wait until some rollouts have ended and others have not."""
    out = folder / "out.jsonl"

    def some() -> bool:
        assert command.poll() is None, command.communicate()
        return out.exists() and out.read_bytes().count(b"\n") >= 5

    wait_until(some, timeout=60, what="the first rows")


def children(pid: int) -> dict[int, str]:
    """Return the processes below a process, with their arguments."""
    found: dict[int, str] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
            found |= children(child)
    return found


def check_whole(folder: Path) -> None:
    """Every rollout is there, once, in order, and the metrics say so too."""
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()
    ]
    places = [(row["example_index"], row["sample_index"]) for row in rows]
    assert Counter(places) == Counter((e, s) for e in range(EXAMPLES) for s in range(SAMPLES))
    assert places == sorted(places)
    assert (folder / "out.failures.jsonl").read_text() == ""
    metrics = json.loads((folder / "out.metrics.json").read_text())
    assert metrics["complete"] is True
    assert metrics["rollouts"]["succeeded"] == EXAMPLES * SAMPLES
    assert len({row["run_id"] for row in rows}) == 1


def test_ctrl_c_and_resume(folder: Path) -> None:
    with submitted(folder) as command:
        in_the_middle(folder, command)
        below = children(command.pid)
        command.send_signal(signal.SIGINT)
        _, said = command.communicate(timeout=60)
    assert command.returncode == 130
    assert "Traceback" not in said
    assert said.rstrip().endswith("--concurrency 4 -o out.jsonl --resume")
    assert not any(_running(pid) for pid in below), "the stack is down"
    assert json.loads((folder / "out.metrics.json").read_text())["complete"] is False
    before = (folder / "out.jsonl").read_bytes()
    assert before.count(b"\n") < EXAMPLES * SAMPLES
    with submitted(folder, "--resume") as command:
        _, said = command.communicate(timeout=60)
    assert command.returncode == 0, said
    check_whole(folder)
    assert set(before.splitlines()) <= set((folder / "out.jsonl").read_bytes().splitlines()), "rows are kept"


@pytest.mark.guarantee("G9")
def test_kill_9_and_resume(folder: Path) -> None:
    with submitted(folder) as command:
        in_the_middle(folder, command)
        below = children(command.pid)
        assert any("redis-server" in argv for argv in below.values())
        assert sum("celery" in argv for argv in below.values()) >= 4, "gpu, cpu and its child, beat"
        command.kill()
        command.wait()
        wait_until(lambda: not any(_running(pid) for pid in below), what="the stack to follow")
    with submitted(folder, "--resume") as command:
        _, said = command.communicate(timeout=60)
    assert command.returncode == 0, said
    check_whole(folder)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.guarantee("G3")
@pytest.mark.parametrize("victim", ["workers.gpu", "workers.cpu", "redis-server", "beat beat"])
def test_the_run_survives_kill_9_of_any_part(folder: Path, victim: str) -> None:
    with submitted(folder) as command:
        in_the_middle(folder, command)
        [pid, *_] = [pid for pid, argv in children(command.pid).items() if victim in argv]
        os.kill(pid, signal.SIGKILL)
        _, said = command.communicate(timeout=90)
    assert command.returncode == 0, said
    assert "was killed by SIGKILL" in said
    check_whole(folder)
