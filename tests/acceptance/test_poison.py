"""Rollouts that kill their worker fail with its last words; the others succeed, the stack stays up (G6)."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from tests.acceptance.commands import check_each_once, metrics, submitted, write_input

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLES = 120
POISON = {5: "exit", 6: "segfault", 60: "exit", 61: "segfault", 119: "exit"}

ENVIRONMENT = textwrap.dedent(
    """
    import ctypes
    import os

    from gym_queue.environments.base import Environment, Observation
    from gym_queue.records import Verdict


    class Deadly(Environment):
        def reset(self, example, session):
            match example.row.get("poison"):
                case "exit":
                    os._exit(3)
                case "segfault":
                    ctypes.string_at(0)
            return Observation(messages=({"role": "user", "content": "hello"},))

        def verify(self, example, trajectory):
            return Verdict(reward=1.0)
    """
)


def test_poison_is_told_from_its_company(tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(ENVIRONMENT)
    write_input(tmp_path, [{"poison": POISON.get(number, "")} for number in range(EXAMPLES)])
    arguments = [
        "--model",
        "stub:?delay=0.05",
        "--environment",
        "python:deadly:Deadly",
        "--concurrency",
        "16",
    ]
    with submitted(tmp_path, *arguments, GYM_QUEUE_SWEEP_INTERVAL=1) as command:
        assert command.end(110) == 1, command.said
    rows = check_each_once(tmp_path, EXAMPLES, 1)
    failed = {row["example_index"]: row for row in rows if row["state"] == "failed"}
    assert set(failed) == set(POISON)
    for index, row in failed.items():
        how = "ended with status 3" if POISON[index] == "exit" else "was killed by SIGSEGV"
        assert (row["class"], how in row["error"]) == ("infrastructure", True), row["error"]
    healed = metrics(tmp_path)["healed"]
    assert healed["lost"] >= 3 * len(POISON) - len(POISON), healed
