"""What a rollout of the chaos driver does: its row says it.

The driver copies this module into the run's folder, where the workers import it as ``python:world:World``,
and opens gates by touching files beside it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gym_queue.environments.base import Environment, Observation
from gym_queue.records import Verdict

if TYPE_CHECKING:
    from gym_queue.records import Example, Message, Trajectory

PART = "GYM_QUEUE_CHAOS_PART"
"""Environment variable: what the driver calls this process."""

_LOOK_INTERVAL = 0.05


def _is_open(gate: str) -> bool:
    """Return whether a gate is open for all, or for this worker."""
    file = Path(__file__).with_name(gate)
    return file.exists() or file.with_suffix(f".{os.environ[PART]}").exists()


def _speech(row: dict[str, Any]) -> tuple[Message, ...]:
    return ({"role": "user", "content": "x" * row.get("bytes", 1)},)


def _die(how: str) -> None:
    if how == "segfaults":
        signal.raise_signal(signal.SIGSEGV)
    os._exit(3)


class World(Environment):
    """Waits, sleeps, speaks, fails, hangs and dies as told."""

    def inline(self, example: Example) -> bool:
        return not example.row.get("queued")

    async def reset(self, example: Example, session: dict[str, Any]) -> Observation:
        row = example.row
        session["turns"] = 0
        if gate := row.get("gate"):
            while not _is_open(gate):  # noqa: ASYNC110 - the driver touches a file
                await asyncio.sleep(_LOOK_INTERVAL)
        await asyncio.sleep(row.get("sleep", 0.0))
        match row.get("generating"):
            case "raises":
                raise RuntimeError("as told by its row")
            case "hangs":
                await asyncio.Event().wait()
            case "exits" | "segfaults" as how:
                _die(how)
        return Observation(messages=_speech(row))

    async def step(self, example: Example, session: dict[str, Any], message: Message) -> Observation:
        session["turns"] += 1
        if session["turns"] >= example.row.get("turns", 1):
            return Observation(done=True)
        await asyncio.sleep(example.row.get("tool", 0.0))
        return Observation(messages=_speech(example.row))

    def verify(self, example: Example, trajectory: Trajectory) -> Verdict:
        match example.row.get("verifying"):
            case "raises":
                raise RuntimeError("as told by its row")
            case "hangs":
                while True:
                    time.sleep(0.1)
            case "exits" | "segfaults" as how:
                _die(how)
        return Verdict(reward=example.row["reward"])
