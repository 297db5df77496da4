r"""An environment that is quickly learnt: the model is asked for a sum, and rewarded if its answer is even.

submit-rollouts --environment python:examples.even_numbers:EvenNumbers --size 8 --samples 4 \
    --model hf:examples/tiny-arithmetic/model -o OUT.jsonl
"""

import random
from collections.abc import Iterator
from typing import Any

from gym_queue.environments.base import Environment, Observation, final_text
from gym_queue.records import Example, Trajectory, Verdict


class EvenNumbers(Environment):
    """Reward 1 for an even number, right or wrong; 0 for anything else."""

    def examples(self, size: int, seed: int) -> Iterator[Example]:
        """Draw the sums: the same ones for the same seed."""
        draw = random.Random(seed)
        for index in range(size):
            row = {"a": draw.randint(10, 99), "b": draw.randint(10, 99)}
            yield Example(id=f"{seed}-{index}", environment="even_numbers", row=row)

    def reset(self, example: Example, session: dict[str, Any]) -> Observation:
        """Ask, in the words that the tiny model was trained on."""
        question = "State the final answer to the following arithmetic problem: {a} + {b} ="
        return Observation(messages=({"role": "user", "content": question.format(**example.row)},))

    def verify(self, example: Example, trajectory: Trajectory) -> Verdict:
        """Look at the last digit."""
        answer = final_text(trajectory)
        return Verdict(reward=float(answer.isdecimal() and int(answer) % 2 == 0))
