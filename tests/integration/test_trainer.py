"""A trainer that streams groups from a real head: either is killed, and each group comes once.

Head and workers are processes of their own; so is the trainer, which keeps with each group the cursor behind
it, as a real one keeps it with its checkpoint.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import sys
import textwrap
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue import AsyncClient
from gym_queue.embedded.children import kill_session, last_words, spawn
from gym_queue.records import RunState
from gym_queue.testing import async_wait_until
from tests.integration.fleet import REPOSITORY, Fleet

if TYPE_CHECKING:
    import subprocess
    from collections.abc import AsyncIterator
    from pathlib import Path

TOKEN = "of the trainer's test"  # noqa: S105 - it guards nothing
SAMPLES = 8

TRAINER = textwrap.dedent(
    """
    import os, sys
    from gym_queue import Client

    run_id, path = sys.argv[1:]
    kept = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    lines = os.pread(kept, 1 << 24, 0).decode().splitlines()
    cursor = lines[-1].split()[1] if lines else None
    with Client() as client:
        for group in client.run(run_id).groups(cursor):
            assert len(group.rollouts) == 8 and set(group.rewards) == {1.0}, group
            os.write(kept, f"{group.example_index} {group.cursor}\\n".encode())
    """
)


class Scene:
    """A fleet, a head, a trainer, and what the trainer has seen."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self.fleet = fleet
        self.folder = folder
        self.kept = folder / "kept"
        self.processes: list[subprocess.Popen[bytes]] = []
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = server.getsockname()[1]
        self.variables = {
            **fleet.variables,
            "HEAD_SERVER_URL": f"http://127.0.0.1:{self.port}",
            "GYM_QUEUE_AUTH_TOKEN": TOKEN,
            "GYM_QUEUE_RUNS_DIR": str(folder / "runs"),
        }

    def start(self, name: str, *argv: str) -> subprocess.Popen[bytes]:
        """Start a process of ours."""
        command = [sys.executable, *argv]
        process = spawn(command, self.folder / f"{name}.log", environment=self.variables, cwd=self.folder)
        self.processes.append(process)
        return process

    def end(self) -> None:
        for process in self.processes:
            kill_session(process)

    async def start_head(self) -> subprocess.Popen[bytes]:
        """Start ``gym-queue head`` and wait until it listens."""
        log = self.folder / "head.log"
        before = log.read_text().count("the head listens on") if log.exists() else 0
        head = self.start("head", "-m", "gym_queue.cli.main", "head", "--port", str(self.port))

        def listens() -> bool:
            assert head.poll() is None, last_words(log)
            return log.read_text().count("the head listens on") > before

        await async_wait_until(listens, 60, what="a head that listens")
        return head

    def start_trainer(self, run_id: str) -> subprocess.Popen[bytes]:
        return self.start("trainer", "-c", TRAINER, run_id, str(self.kept))

    def client(self) -> AsyncClient:
        return AsyncClient(self.variables["HEAD_SERVER_URL"], TOKEN, patience=60.0)

    def seen(self) -> list[int]:
        """Return the indices of the groups that the trainer has kept, in the order in which they came."""
        lines = self.kept.read_text().splitlines() if self.kept.exists() else []
        return [int(line.split()[0]) for line in lines]

    async def saw(self, count: int, trainer: subprocess.Popen[bytes]) -> None:
        """Wait until the trainer has kept so many groups."""

        def reached() -> bool:
            enough = len(self.seen()) >= count
            assert enough or trainer.poll() is None, last_words(self.folder / "trainer.log")
            return enough

        await async_wait_until(reached, 60, what=f"{count} groups; {len(self.seen())} were seen")


def questions(first: int, count: int) -> list[dict[str, Any]]:
    return [{"id": str(n), "prompt": "say ok", "answer": "ok"} for n in range(first, first + count)]


@pytest.fixture
async def scene(redis_url: str, tmp_path: Path) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(Fleet(redis_url, tmp_path, GYM_QUEUE_CONCURRENCY=64))
        made = Scene(fleet, tmp_path)
        stack.callback(made.end)
        await fleet.start("gpu1")
        yield made


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(30)


@pytest.mark.timeout(300)
@pytest.mark.guarantee("G1", "G3")
async def test_a_trainer_that_is_killed_sees_each_of_10000_rollouts_groups_once(scene: Scene) -> None:
    """The run grows while it goes on, so that there are groups to come at each of the trainer's deaths."""
    groups, step = 1250, 125
    await scene.start_head()
    amid = 0
    async with scene.client() as client:
        run = await client.submit(model="stub:?text=ok&delay=0.05", samples=SAMPLES)
        trainer = scene.start_trainer(run.run_id)
        for there in range(0, groups, step):
            await run.append(questions(there, step))
            if there % (2 * step) == 0:  # while the groups of this step come
                await scene.saw(there + step // 3, trainer)
                kill(trainer)
                amid += len(scene.seen()) < there + step
                trainer = scene.start_trainer(run.run_id)
        await run.close()
        await scene.saw(groups, trainer)
        assert trainer.wait(60) == 0, last_words(scene.folder / "trainer.log")
        assert (await run.status()).state is RunState.ENDED
    assert sorted(scene.seen()) == list(range(groups))
    assert amid > 0, "it never died amid groups that came"


@pytest.mark.timeout(300)
@pytest.mark.guarantee("G3")
async def test_a_head_that_is_killed_is_waited_for_by_its_trainer(scene: Scene) -> None:
    head = await scene.start_head()
    groups, step = 200, 50
    async with scene.client() as client:
        run = await client.submit(model="stub:?text=ok", samples=SAMPLES)
        trainer = scene.start_trainer(run.run_id)
        for there in range(0, groups, step):
            await run.append(questions(there, step))
            await scene.saw(there + step // 3, trainer)
            kill(head)
            head = await scene.start_head()
        await run.close()
        await scene.saw(groups, trainer)
        assert trainer.wait(60) == 0, last_words(scene.folder / "trainer.log")
    assert sorted(scene.seen()) == list(range(groups))
    log = (scene.folder / "trainer.log").read_text()
    assert len(re.findall("; trying again", log)) == len(re.findall("answers again, after", log)) >= 1


@pytest.mark.timeout(300)
@pytest.mark.guarantee("G9")
async def test_submit_rollouts_to_a_head(scene: Scene) -> None:
    """The whole command against a real head: interrupted, resumed, every rollout once."""
    await scene.start_head()
    out, log = scene.folder / "out.jsonl", scene.folder / "submit.log"
    rows = questions(0, 300)
    (scene.folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", "stub:?text=ok&delay=0.05", "--samples", str(SAMPLES), "-o", str(out)]
    argv = ["-m", "gym_queue.cli.submit", "in.jsonl", *flags]
    first = scene.start("submit", *argv)
    await async_wait_until(lambda: out.exists() and out.stat().st_size > 0, 60, what="the first rows")
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130, last_words(log)
    second = scene.start("submit", *argv, "--resume")
    assert second.wait(120) == 0, last_words(log)
    text = log.read_text()
    assert "interrupted; the run goes on at http://127.0.0.1:" in text
    assert "2400 rollouts: 2400 succeeded, 0 failed\nmean reward 1.0000" in text
    written = map(json.loads, out.read_text().splitlines())
    places = [(row["example_index"], row["sample_index"]) for row in written]
    assert places == [(example, sample) for example in range(300) for sample in range(SAMPLES)]
    metrics = json.loads((scene.folder / "out.metrics.json").read_text())
    assert metrics["complete"]
    assert metrics["healed"] is not None


@pytest.mark.timeout(300)
async def test_the_example_evaluates_a_model_through_a_real_head(scene: Scene) -> None:
    await scene.start_head()
    path = scene.folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in questions(0, 5)))
    script = str(REPOSITORY / "examples" / "evaluate.py")
    done = scene.start("evaluate", script, str(path), "stub:?text=ok")
    assert done.wait(120) == 0, last_words(scene.folder / "evaluate.log")
    lines = (scene.folder / "evaluate.log").read_text().splitlines()
    assert len(lines) == 22
    assert lines[-2:] == ["mean reward 1.000", "pass@1 1.000, pass@2 1.000, pass@4 1.000"]
