"""The documented example of a user's own environment, and the README's copy of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from examples.count_letters import CountLetters
from gym_queue.records import Trajectory

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("answer", "reward"), [("3", 1.0), (" 3.", 1.0), ("4", 0.0), ("", 0.0)])
def test_an_answer_is_scored(answer: str, reward: float) -> None:
    environment = CountLetters()
    example = next(environment.examples(1, seed=1))
    example = example.model_copy(update={"row": {"word": "banana", "letter": "a"}})
    opening = environment.reset(example, {}).messages
    assert opening[0]["content"] == "How often does 'a' occur in 'banana'? Answer with a number."
    messages = (*opening, {"role": "assistant", "content": answer})
    trajectory = Trajectory(messages=messages, finish_reason="stop")
    assert environment.verify(example, trajectory).reward == reward


def test_the_readme_shows_the_very_file() -> None:
    readme = (ROOT / "README.md").read_text()
    shown, *_ = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert shown == (ROOT / "examples/count_letters.py").read_text()


def test_pages_link_to_what_exists() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"
