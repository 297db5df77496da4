"""What every environment must do, whatever it is: the agent's loop and the verifiers rely on it.

An environment of your own belongs into ``WORLDS``, with examples that it brings or is given.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.environments import python, reasoning_gym, rows
from gym_queue.records import Example, Trajectory, Verdict
from gym_queue.verification.rewards import VERIFIERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from gym_queue.environments.base import Environment, Observation

_MAX_TURNS = 32


@dataclass(frozen=True)
class World:
    """How a worker would make the environment, what the model says, and rows for those that need them."""

    make: Callable[[], Environment]
    says: str = "50"
    rows: tuple[dict[str, Any], ...] = ()


def _rows(*rows_: dict[str, Any]) -> World:
    return World(make=lambda: rows.create("rows", VERIFIERS), rows=rows_)


def _named(module: Any, name: str, says: str = "50") -> World:
    return World(make=lambda: module.create(name), says=says)


WORLDS = {
    "rows": _rows({"prompt": "25 + 25?", "answer": 50}, {"messages": [{"role": "user", "content": "Hi"}]}),
    "rows, queued": _rows({"prompt": "25 + 25?", "answer": "100/2", "verifier": "math_verify"}),
    "reasoning_gym, rebuilt": _named(reasoning_gym, "reasoning_gym:chain_sum?max_terms=2"),
    "reasoning_gym, carried": _named(reasoning_gym, "reasoning_gym:ransom_note", says="True"),
    "python": _named(python, "python:examples.guess_number:GuessNumber?high=60"),
}


@pytest.fixture(params=list(WORLDS))
def world(request: pytest.FixtureRequest) -> World:
    return WORLDS[request.param]


async def _answer(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _examples(world: World, environment: Environment, size: int = 3) -> list[Example]:
    if world.rows:
        return [Example(id=f"{place}", environment="?", row=row) for place, row in enumerate(world.rows)]
    return list(environment.examples(size, seed=5))


async def _drive(world: World, environment: Environment, example: Example) -> Trajectory:
    session: dict[str, Any] = {}
    try:
        observation: Observation = await _answer(environment.reset(example, session))
        assert not observation.done
        messages = list(observation.messages)
        for _ in range(_MAX_TURNS):
            assert messages
            assert messages[-1]["role"] != "assistant"
            messages.append({"role": "assistant", "content": world.says})
            observation = await _answer(environment.step(example, session, messages[-1]))
            messages.extend(observation.messages)
            if observation.done:
                break
        return Trajectory(messages=tuple(messages), finish_reason="stop", state=observation.state)
    finally:
        await _answer(environment.close(session))


async def test_its_examples_are_the_same_each_time_and_have_their_own_ids(world: World) -> None:
    examples = _examples(world, world.make())
    assert examples == _examples(world, world.make())
    assert len({example.id for example in examples}) == len(examples)
    assert len(examples) == (len(world.rows) or 3)


async def test_it_takes_its_own_examples(world: World) -> None:
    environment = world.make()
    for example in _examples(world, environment):
        environment.check(example)
        assert isinstance(environment.inline(example), bool)


async def test_a_rollout_ends_and_is_scored(world: World) -> None:
    environment = world.make()
    for example in _examples(world, environment):
        verdict: Verdict = await _answer(
            environment.verify(example, await _drive(world, environment, example))
        )
        assert isinstance(verdict, Verdict)
        asked = not world.rows or "answer" in example.row
        assert (verdict.reward is not None) == asked


async def test_another_process_sees_the_same_and_scores_the_same(world: World) -> None:
    here, there = world.make(), world.make()
    for example in _examples(world, here):
        travelled = Example.model_validate(json.loads(example.model_dump_json()))
        trajectory = await _drive(world, here, example)
        assert (await _drive(world, there, travelled)) == trajectory
        arrived = Trajectory.model_validate(json.loads(trajectory.model_dump_json()))
        verdict = await _answer(here.verify(example, trajectory))
        assert await _answer(there.verify(travelled, arrived)) == verdict


async def test_rollouts_of_one_object_do_not_disturb_each_other(world: World) -> None:
    environment = world.make()
    example = _examples(world, environment)[0]
    sessions: list[dict[str, Any]] = [{}, {}]
    openings = [await _answer(environment.reset(example, session)) for session in sessions]
    assert openings[0] == openings[1]
    said = {"role": "assistant", "content": world.says}
    answers = [await _answer(environment.step(example, session, said)) for session in sessions]
    assert answers[0] == answers[1]


async def test_close_follows_reset_at_any_point(world: World) -> None:
    environment = world.make()
    session: dict[str, Any] = {}
    assert await _answer(environment.close(session)) is None
    await _answer(environment.reset(_examples(world, environment)[0], session))
    assert await _answer(environment.close(session)) is None
