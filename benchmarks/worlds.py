"""Environments of the benchmark, as users write theirs: ``python:benchmarks.worlds:CLASS?key=value``."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gym_queue.environments.base import Environment, Observation
from gym_queue.records import Verdict

if TYPE_CHECKING:
    from gym_queue.records import Example, Message, Trajectory

_LONGEST = 3.0
"""Where the long tail is cut off, in means: so that a run ends in bounded time."""

_GLANCE = 0.5


class Quick(Environment):
    """One prompt, ``turns`` answers, a verdict at once. ``padding`` characters come with the last answer:
    numbers, which shrink about as much as token ids and logprobs do.
    """

    def __init__(self, turns: int = 1, padding: int = 0) -> None:
        self.turns = turns
        chance = random.Random(padding)
        self._padding = "".join(f"{chance.random()}," for _ in range(padding // 16))[:padding]

    def reset(self, example: Example, session: dict[str, Any]) -> Observation:
        """Ask."""
        session["turn"] = 0
        return Observation(messages=({"role": "user", "content": example.row["prompt"]},))

    def step(self, example: Example, session: dict[str, Any], message: Message) -> Observation:
        """Ask again, or end."""
        session["turn"] += 1
        if session["turn"] < self.turns:
            return Observation(messages=({"role": "user", "content": "And then?"},))
        padding = ({"role": "user", "content": self._padding},) if self._padding else ()
        return Observation(messages=padding, done=True)

    def verify(self, example: Example, trajectory: Trajectory) -> Verdict:
        """Say yes."""
        return Verdict(reward=1.0)


class Sleeping(Quick):
    """A rollout that takes its time, as those of a model do: log-normal (sigma 1) around a ``mean``, in s."""

    def __init__(self, mean: float = 0.5) -> None:
        super().__init__()
        self.mean = mean

    async def step(  # type: ignore[override]
        self, example: Example, session: dict[str, Any], message: Message
    ) -> Observation:
        """Sleep, and say for how long."""
        drawn = random.lognormvariate(-0.5, 1.0)
        seconds = self.mean * min(drawn, _LONGEST)
        await asyncio.sleep(seconds)
        return Observation(done=True, state={"slept": seconds})

    def verify(self, example: Example, trajectory: Trajectory) -> Verdict:
        """Hand on how long it slept: the ideal is made of it."""
        return Verdict(reward=1.0, metrics={"slept": trajectory.state["slept"]})


class Gated(Quick):
    """Rollouts that all wait until the file ``gate`` is there: what they take meanwhile can be looked at."""

    def __init__(self, gate: str) -> None:
        super().__init__()
        self.gate = Path(gate)

    async def step(  # type: ignore[override]
        self, example: Example, session: dict[str, Any], message: Message
    ) -> Observation:
        """Wait."""
        while not self.gate.exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(_GLANCE)
        return Observation(done=True)


class Queued(Quick):
    """A verifier that takes ``seconds`` and runs in the second queue."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds = seconds

    def inline(self, example: Example) -> bool:
        """Never: that is what is measured."""
        return False

    def verify(self, example: Example, trajectory: Trajectory) -> Verdict:
        """Take the time."""
        time.sleep(self.seconds)
        return Verdict(reward=1.0)
