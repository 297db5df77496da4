"""The loop that turns an example into a trajectory: engine speaks, environment answers, until one ends it.

A single turn is a conversation whose environment is done after the first answer; calling a tool is a turn
like any other (the environment reads ``tool_calls`` of the assistant's message and answers with ``tool``
messages). One loop serves them all.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from typing import TYPE_CHECKING, Any

from gym_queue.agents.tokens import TokenLog
from gym_queue.deadline import Deadline
from gym_queue.environments.base import Observation
from gym_queue.errors import EnvironmentFailedError, GymQueueError
from gym_queue.records import Trajectory
from gym_queue.telemetry.story import step

if TYPE_CHECKING:
    from collections.abc import Callable

    from gym_queue.engines.base import Engine
    from gym_queue.environments.base import Environment
    from gym_queue.records import Example, Message, RunSpec, Usage

_log = logging.getLogger(__name__)

_LONGEST_ERROR = 500
_SEED_STEP = 1_000_000_007
_SEED_RANGE = 2**31
"""Seeds stay below this: every endpoint takes a positive 32-bit integer."""


async def act(
    example: Example, environment: Environment, engine: Engine, spec: RunSpec, *, ordinal: int
) -> Trajectory:
    """Let the model act on one example until the environment is done or ``max_turns`` is reached.

    ``environment.close`` is called once, whatever happens, cancellation included.

    Args:
        example: what to act on.
        environment: answers the model. Its plain methods run on the event loop and should be quick; ``async``
            ones are given ``limits.tool_timeout`` seconds a call.
        engine: writes the assistant's messages.
        spec: the run's sampling and limits.
        ordinal: ``example_index * samples + sample_index``; with the run's seed it seeds this rollout.

    Returns:
        All messages, summed usage, the environment's closing state, and tokens where the engine gives ids in
        every turn. ``finish_reason`` is the last completion's, or ``max_turns``.

    Raises:
        EnvironmentFailedError: the environment raised, or answered with what cannot be an answer.
        StageTimeoutError: one of its calls took longer than ``tool_timeout``.
        WorkerStoodStillError: nobody knows how long it took.
        GymQueueError: whatever engine or environment raised from this tree passes unchanged.
    """
    world = _World(example, environment, spec.limits.tool_timeout)
    try:
        return await _converse(world, engine, spec, ordinal)
    finally:
        await world.close()


async def _converse(world: _World, engine: Engine, spec: RunSpec, ordinal: int) -> Trajectory:
    observation = await world.reset()
    messages: list[Message] = list(observation.messages)
    tools = observation.tools or ()
    log, turn = TokenLog(), 0
    usage: Usage | None = None
    while True:
        if not observation.messages:
            msg = "the environment gave the model nothing to answer and did not end the rollout"
            raise EnvironmentFailedError(msg)
        with step("model"):
            completion = await engine.generate(
                tuple(messages),
                sampling=spec.sampling,
                seed=call_seed(spec.sampling.seed, ordinal, turn),
                tools=tools,
                prefix=log.prefix,
            )
        turn += 1
        messages.append(completion.message)
        log.append(completion)
        usage = completion.usage if usage is None else usage + completion.usage
        observation = await world.step(turn, completion.message)
        messages.extend(observation.messages)
        tools = tools if observation.tools is None else observation.tools
        if observation.done or turn >= spec.limits.max_turns:
            break
    return Trajectory(
        messages=tuple(messages),
        tokens=log.tokens(),
        finish_reason=completion.finish_reason if observation.done else "max_turns",
        usage=usage,
        turns=turn,
        state=observation.state,
    )


def call_seed(seed: int | None, ordinal: int, turn: int) -> int | None:
    """Return the seed of one call: the run's seed + the rollout's ordinal, far from it in later turns."""
    return None if seed is None else (seed + ordinal + turn * _SEED_STEP) % _SEED_RANGE


class _World:
    """One rollout's view of its environment: holds the session, and translates whatever goes wrong inside."""

    def __init__(self, example: Example, environment: Environment, seconds: float) -> None:
        self._example = example
        self._environment = environment
        self._seconds = seconds
        self._session: dict[str, Any] = {}

    async def reset(self) -> Observation:
        observation = await self._ask("reset", self._environment.reset)
        if observation.done:
            msg = "the environment ended the rollout before the model could act"
            raise EnvironmentFailedError(msg)
        return observation

    async def step(self, turn: int, message: Message) -> Observation:
        return await self._ask(f"step {turn}", self._environment.step, message)

    async def close(self) -> None:
        """Close the session. A failure is logged: it must hide neither a finished trajectory nor an error."""
        try:
            closing: Any = self._environment.close(self._session)
            if closing is not None and inspect.isawaitable(closing):
                async with asyncio.timeout(self._seconds):
                    await closing
        except Exception:  # noqa: BLE001 - a user's code may raise anything; see the docstring
            _log.exception("an environment could not close its session")

    async def _ask(self, name: str, method: Callable[..., Any], *arguments: Any) -> Observation:
        """Call a method of the environment, plain or async, within its time."""
        try:
            with step(name):
                answer = method(self._example, self._session, *arguments)
                if not isinstance(answer, Observation) and inspect.isawaitable(answer):
                    late = f"the environment's {name} took longer than tool_timeout ({self._seconds:g} s)"
                    async with Deadline(self._seconds, late):
                        answer = await answer
        except GymQueueError:
            raise
        except Exception as error:
            text = f"the environment's {name} raised {type(error).__name__}: {error}"
            raise EnvironmentFailedError(text[:_LONGEST_ERROR]) from error
        if not isinstance(answer, Observation):
            msg = f"the environment's {name} returned {type(answer).__name__} instead of an Observation"
            raise EnvironmentFailedError(msg)
        return answer
