"""The documented example of a user's own environment."""

from __future__ import annotations

from typing import Any

import pytest

from examples.guess_number import GuessNumber
from gym_queue.records import Trajectory


@pytest.mark.parametrize(
    ("guesses", "hints", "reward"),
    [
        (["I say 25, then 17"], [], 1.0),
        (["30", "8", "17"], ["It is lower.", "It is higher."], pytest.approx(1 / 3)),
        (["1", "nothing", "2"], ["It is higher.", "It is higher."], 0.0),
    ],
)
def test_a_game_of_guesses(guesses: list[str], hints: list[str], reward: float) -> None:
    game = GuessNumber(high=40, guesses=3)
    example = next(game.examples(1, seed=1)).model_copy(update={"row": {"secret": 17}})
    session: dict[str, Any] = {}
    messages = list(game.reset(example, session).messages)
    assert "from 1 to 40" in messages[0]["content"]
    heard = []
    for guess in guesses:
        observation = game.step(example, session, {"role": "assistant", "content": guess})
        heard += [message["content"] for message in observation.messages]
    assert observation.done
    assert heard == hints
    ended = Trajectory(messages=tuple(messages), finish_reason="stop", state=observation.state)
    assert game.verify(example, ended).reward == reward


def test_secrets_follow_the_seed() -> None:
    game = GuessNumber(high=1000)
    secrets = [example.row["secret"] for example in game.examples(50, seed=3)]
    assert secrets == [example.row["secret"] for example in game.examples(50, seed=3)]
    assert secrets != [example.row["secret"] for example in game.examples(50, seed=4)]
    assert 1 <= min(secrets) <= max(secrets) <= 1000
