"""``gym-queue`` beside a real ``submit-rollouts``: look, steer, cancel, and try again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gym_queue.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
WORLD = textwrap.dedent(
    """
    import asyncio
    from pathlib import Path

    from gym_queue.environments.base import Environment, Observation
    from gym_queue.errors import EnvironmentUnavailableError
    from gym_queue.records import Verdict

    HERE = Path(__file__).parent


    class World(Environment):
        async def reset(self, example, session):
            if example.row["does"] == "fails" and not (HERE / "healed").exists():
                raise EnvironmentUnavailableError("the world is away")
            while example.row["does"] == "waits" and not (HERE / "gate").exists():
                await asyncio.sleep(0.05)
            return Observation(messages=({"role": "user", "content": "hello"},))

        def verify(self, example, trajectory):
            return Verdict(reward=1.0)
    """
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six rollouts, of which two run at a time: one succeeds, one fails, four wait for a gate."""
    (tmp_path / "world.py").write_text(WORLD)
    rows = [{"does": does} for does in ("nothing", "fails", *["waits"] * 4)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def variables() -> dict[str, str]:
    dropped = ("GYM_QUEUE_REDIS_URL", "HEAD_SERVER_URL")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"PYTHONPATH": str(ROOT), "GYM_QUEUE_MAX_ATTEMPTS": "1", "WORKER_HEARTBEAT_INTERVAL": "1"}


@contextmanager
def submitted(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the run; make sure that it is gone in the end."""
    command = [sys.executable, "-m", "gym_queue.cli.submit", "in.jsonl", "--model", "stub:"]
    flags = ["--environment", "python:world:World", "--concurrency", "2", "-o", "out.jsonl"]
    process = subprocess.Popen(
        [*command, *flags],
        cwd=folder,
        env=variables(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def gym_queue(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "gym_queue.cli.main", *arguments],
        cwd=folder,
        env=variables(),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert "Traceback" not in result.stderr
    return result


def said(folder: Path, *arguments: str) -> str:
    result = gym_queue(folder, *arguments)
    assert result.returncode == 0, result
    return result.stdout


def at_work(folder: Path, command: subprocess.Popen[str]) -> str:
    """Wait until two rollouts wait for the gate in a worker; return the run's id."""

    def begun() -> bool:
        assert command.poll() is None, command.communicate()
        return "2 in flight" in gym_queue(folder, "runs", "show", "out.jsonl").stdout

    wait_until(begun, timeout=60, what="two rollouts in flight")
    [run] = said(folder, "runs", "--output", "out.jsonl", "--json").splitlines()
    run_id: str = json.loads(run)["run_id"]
    return run_id


def test_look_pause_cancel_and_retry(folder: Path) -> None:
    with submitted(folder) as command:
        run_id = at_work(folder, command)

        def why(place: str) -> str:
            return said(folder, "why", f"{run_id}.{place}", "--output", "out.jsonl")

        assert why("0.0").startswith("ended: succeeded ")
        assert "infrastructure at generate: the world is away" in why("1.0")
        assert why("2.0").startswith("generating for ")
        assert "heartbeat was " in why("2.0")
        assert why("4.0").startswith("queued for ")
        assert "2 workers" in said(folder, "status", "--output", "out.jsonl")
        assert "1 failed (1 by infrastructure)" in said(folder, "runs", "failures", "out.jsonl")
        refused = gym_queue(folder, "runs", "retry", "out.jsonl", "--class", "infrastructure")
        assert refused.returncode == 2
        assert "is being written" in refused.stderr

        assert said(folder, "runs", "pause", "out.jsonl") == "paused: 2 in flight go on, 2 queued wait\n"
        assert "the run is paused" in why("4.0")
        assert said(folder, "runs", "resume", "out.jsonl") == "resumed: 2 queued may start\n"
        cancelled = said(folder, "cancel", f"{run_id}.5.0", "--output", "out.jsonl")
        assert cancelled == "cancelled: it was queued\n"
        assert said(folder, "cancel", f"{run_id}.2.0", "-o", "out.jsonl") == "cancelled: it was generating\n"
        wait_until(lambda: why("4.0").startswith("generating"), 30, what="the slot of what was cancelled")
        (folder / "gate").touch()
        _, words = command.communicate(timeout=60)
    assert command.returncode == 1, words
    assert "1 failed (1 by infrastructure), 2 cancelled" in said(folder, "runs", "failures", "out.jsonl")

    (folder / "healed").touch()
    again = gym_queue(
        folder.parent, "runs", "retry", str(folder / "out.jsonl"), "--class", "infrastructure,cancelled"
    )
    assert again.returncode == 0, again
    assert "6 rollouts: 6 succeeded, 0 failed" in again.stdout
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [row["rollout_id"] for row in rows] == [f"{run_id}.{index}.0" for index in range(6)]
    assert (folder / "out.failures.jsonl").read_text() == ""


def test_cancelling_a_run_ends_it(folder: Path) -> None:
    with submitted(folder) as command:
        at_work(folder, command)
        assert said(folder, "runs", "cancel", "out.jsonl") == "cancelled: 2 queued, 2 in flight\n"
        _, words = command.communicate(timeout=60)
    assert command.returncode == 1, words
    assert "cancelled" in words
    assert "1 failed (1 by infrastructure), 4 cancelled" in said(folder, "runs", "failures", "out.jsonl")
    assert "Traceback" not in words
