r"""A whole environment of one's own: the model guesses a number and is told whether it is higher or lower.

submit-rollouts --environment "python:examples.guess_number:GuessNumber?high=20" --size 8 --samples 4 \
    --model MODEL -o OUT.jsonl
"""

import random
import re
from collections.abc import Iterator
from typing import Any

from gym_queue.environments.base import Environment, Observation
from gym_queue.records import Example, Message, Trajectory, Verdict


class GuessNumber(Environment):
    """Reward: 1 for a hit at the first guess, 1/2 at the second, and so on; 0 if never."""

    def __init__(self, high: int = 100, guesses: int = 7) -> None:
        self.high, self.guesses = high, guesses

    def examples(self, size: int, seed: int) -> Iterator[Example]:
        """Draw the secrets: the same ones for the same seed."""
        draw = random.Random(seed)
        for index in range(size):
            secret = {"secret": draw.randint(1, self.high)}
            yield Example(id=f"guess-{seed}-{index}", environment="guess_number", row=secret)

    def reset(self, example: Example, session: dict[str, Any]) -> Observation:
        """Ask for the first guess."""
        session["guesses"] = 0
        question = f"I think of a number from 1 to {self.high}. Answer with one number and nothing else."
        return Observation(messages=({"role": "user", "content": question},))

    def step(self, example: Example, session: dict[str, Any], message: Message) -> Observation:
        """Answer a guess; the last state is what ``verify`` sees."""
        session["guesses"] += 1
        numbers = re.findall(r"\d+", message["content"] or "")
        guess, secret = int(numbers[-1]) if numbers else 0, example.row["secret"]
        hint = {"role": "user", "content": "It is higher." if guess < secret else "It is lower."}
        state = {"guesses": session["guesses"], "hit": guess == secret}
        if state["hit"] or session["guesses"] == self.guesses:
            return Observation(done=True, state=state)
        return Observation(messages=(hint,), state=state)

    def verify(self, example: Example, trajectory: Trajectory) -> Verdict:
        """Score; this may run in another process."""
        state = trajectory.state
        return Verdict(reward=1 / state["guesses"] if state["hit"] else 0.0)
