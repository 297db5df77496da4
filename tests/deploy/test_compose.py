"""``compose/compose.yaml`` on a real engine: rollouts from outside while containers come, go and die."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from gym_queue import names
from gym_queue.testing import wait_until
from tests.acceptance.commands import check_each_once, submitted, write_input
from tests.deploy.browser import page
from tests.deploy.composition import FILES, IMAGE
from tests.deploy.engine import ROOT, compose, found

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploy.composition import Composition
    from tests.deploy.engine import Engine

pytestmark = pytest.mark.timeout(1200)

EXAMPLES, SAMPLES = 125, 4
CONCURRENCY = 8


def test_a_missing_secret_is_one_sentence(engine: Engine, tmp_path: Path) -> None:
    given: dict[str, str] = {}
    for name in ("REDIS_PASSWORD", "GYM_QUEUE_AUTH_TOKEN", "FLOWER_PASSWORD"):
        (tmp_path / "env").write_text("".join(f"{known}={value}\n" for known, value in given.items()))
        said = engine.run(*compose(), "--env-file", str(tmp_path / "env"), *FILES, "config", check=False)
        assert f"set {name} in compose/.env to" in said
        given[name] = "given"
    (tmp_path / "env").write_text("".join(f"{known}={value}\n" for known, value in given.items()))
    engine.run(*compose(), "--env-file", str(tmp_path / "env"), *FILES, "config")


def test_nobody_is_root_and_nothing_can_be_written(composition: Composition) -> None:
    for container in composition.containers():
        inside = [found("docker"), "exec", container["Id"]]
        assert composition.engine.run(*inside, "id", "-u").strip() == "10001"
        assert "Read-only" in composition.engine.run(*inside, "touch", "/opt/gym-queue/x", check=False)
        assert container["HostConfig"]["CapDrop"] == ["ALL"]
        shown = json.dumps([container["Args"], container["Path"], container["Config"]["Cmd"]])
        assert composition.redis_password not in shown
        assert composition.flower_password not in shown
    arguments = composition.engine.run(found("docker"), "history", "--no-trunc", IMAGE)
    assert composition.redis_password not in arguments


def test_doctor_finds_nothing_amiss(composition: Composition) -> None:
    said = composition.call("exec", "-T", "cpu-worker", "gym-queue", "doctor", "--role", "cpu")
    assert "warn" not in said
    assert "fail" not in said
    assert "beat: " in said


def test_every_row_once_while_workers_come_go_and_are_killed(
    composition: Composition, tmp_path: Path
) -> None:
    verifiers = ("exact", "math_verify")  # at once, and in the second queue
    write_input(
        tmp_path,
        [{"prompt": f"{i}?", "answer": "42", "verifier": verifiers[i % 2]} for i in range(EXAMPLES)],
    )
    arguments = ("--model", "stub:?text=42&delay=1.2", "--samples", str(SAMPLES))
    to_head = {"HEAD_SERVER_URL": composition.head_url, "GYM_QUEUE_AUTH_TOKEN": composition.token}
    before = composition.workers()
    with submitted(tmp_path, *arguments, **to_head) as command:
        command.reach(20)
        composition.up(gpu_workers=3)
        wait_until(lambda: len(composition.workers()) == 3, 120, what="three workers")
        assert before < composition.workers(), "each has a name of its own"
        command.reach(120)
        kill(composition, "gpu-worker")
        command.reach(200)
        kill(composition, "head")
        assert command.process.poll() is None, "what follows has to happen while the run goes on"
        composition.up(gpu_workers=1)
        assert command.end(300) == 0, command.said
    rows = check_each_once(tmp_path, EXAMPLES, SAMPLES)
    assert {row["reward"] for row in rows} == {1.0}
    again = Counter(row["attempt"] > 1 for row in rows)
    assert 0 < again[True] <= 2 * CONCURRENCY, "the killed one lost what it held, those taken down nothing"
    wait_until(lambda: len(composition.workers()) == 1, 60, what="one worker")
    composition.wait_healthy()


def kill(composition: Composition, service: str) -> None:
    """Kill the first container of a service."""
    victim = composition.containers(service)[0]["Id"]
    composition.engine.run(found("docker"), "kill", victim)


def test_flower_shows_our_tasks_under_their_names(composition: Composition) -> None:
    refused = subprocess.run(
        [
            "/usr/bin/env",
            "python3",
            "-c",
            f"import urllib.request as r; r.urlopen('{composition.flower_url}')",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "HTTP Error 401" in refused.stderr
    with page("operator", composition.flower_password) as shown:
        shown.goto(f"{composition.flower_url}/tasks?limit=500")
        for task in (names.GENERATE_TASK, names.VERIFY_TASK):
            shown.goto(f"{composition.flower_url}/tasks")
            shown.wait_for_selector("#tasks-table tbody td:nth-child(2)")
            shown.fill("input[type=search]", task)
            shown.wait_for_function(
                f"() => document.querySelector('#tasks-table tbody td')?.innerText === '{task}'"
            )
            assert "SUCCESS" in shown.inner_text("#tasks-table")
            shown.screenshot(path=ROOT / "build" / "deploy" / f"flower-{task}.png")
        shown.goto(f"{composition.flower_url}/workers")
        shown.wait_for_selector("text=gpu@")
        shown.wait_for_selector("text=cpu@")
        shown.screenshot(path=ROOT / "build" / "deploy" / "flower-workers.png")
