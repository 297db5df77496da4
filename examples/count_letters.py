"""How often does a letter occur in a word? A whole environment of one's own."""

import random
from collections.abc import Iterator
from typing import Any

from gym_queue.environments.base import Environment, Observation, final_text
from gym_queue.records import Example, Trajectory, Verdict

WORDS = ["banana", "bookkeeper", "committee", "mississippi", "strawberry"]


class CountLetters(Environment):
    def examples(self, size: int, seed: int) -> Iterator[Example]:
        draw = random.Random(seed)
        for index in range(size):
            row = {"word": draw.choice(WORDS), "letter": draw.choice("abekmst")}
            yield Example(id=f"{seed}-{index}", environment="count_letters", row=row)

    def reset(self, example: Example, session: dict[str, Any]) -> Observation:
        question = "How often does {letter!r} occur in {word!r}? Answer with a number.".format(**example.row)
        return Observation(messages=({"role": "user", "content": question},))

    def verify(self, example: Example, trajectory: Trajectory) -> Verdict:
        count = example.row["word"].count(example.row["letter"])
        return Verdict(reward=float(final_text(trajectory).strip(" .") == str(count)))
