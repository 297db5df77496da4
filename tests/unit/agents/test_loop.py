"""The loop: who is asked what, in which order, and what a failure becomes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.agents.loop import act, call_seed
from gym_queue.engines.base import Completion
from gym_queue.engines.stub import create as create_stub
from gym_queue.environments.base import Environment, Observation
from gym_queue.errors import (
    EngineUnavailableError,
    EnvironmentFailedError,
    EnvironmentUnavailableError,
    StageTimeoutError,
)
from gym_queue.records import Example, Limits, RunSpec, Sampling, Usage
from gym_queue.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gym_queue.records import Message, Weights

EXAMPLE = Example(id="e", environment="test", row={"prompt": "2+2"})
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
ASK = {"role": "user", "content": "2+2"}


def spec(**changes: Any) -> RunSpec:
    limits = Limits(**{"max_turns": 8, "tool_timeout": 5.0, **changes.pop("limits", {})})
    return RunSpec(
        run_id="r", model="stub:", samples=4, sampling=Sampling(seed=changes.pop("seed", 10)), limits=limits
    )


class Talk(Environment):
    """Asks ``turns`` times, then ends; remembers sessions that it closed."""

    def __init__(self, turns: int = 1) -> None:
        self.turns = turns
        self.closed: list[dict[str, Any]] = []

    def reset(self, example: Example, session: dict[str, Any]) -> Observation:
        session["seen"] = 0
        return Observation(messages=({"role": "user", "content": example.row["prompt"]},))

    def step(self, example: Example, session: dict[str, Any], message: Message) -> Observation:
        session["seen"] += 1
        if session["seen"] == self.turns:
            return Observation(done=True, state={"seen": session["seen"]})
        return Observation(messages=({"role": "user", "content": f"again {session['seen']}"},))

    def close(self, session: dict[str, Any]) -> None:
        self.closed.append(session)


class Recorder:
    """Answers ``reply n`` and keeps what it was asked."""

    def __init__(self, answer: Callable[[], Any] | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.answer = answer

    async def generate(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling,
        seed: int | None,
        tools: Sequence[dict[str, Any]] = (),
        prefix: tuple[int, ...] = (),
    ) -> Completion:
        self.calls.append({"messages": list(messages), "seed": seed, "tools": list(tools), "prefix": prefix})
        if self.answer is not None:
            await self.answer()
        prompt = (*prefix, 1)
        return Completion(
            message={"role": "assistant", "content": f"reply {len(self.calls)}"},
            finish_reason="stop",
            usage=Usage(prompt_tokens=len(prompt), completion_tokens=2),
            prompt_token_ids=prompt,
            token_ids=(2, 3),
            logprobs=(-0.1, -0.2),
        )

    async def load(self, weights: Weights) -> None:
        """Nothing to load."""

    async def close(self) -> None:
        """Nothing to free."""


async def test_a_single_turn() -> None:
    environment, engine = Talk(), Recorder()
    trajectory = await act(EXAMPLE, environment, engine, spec(), ordinal=3)
    assert [message["content"] for message in trajectory.messages] == ["2+2", "reply 1"]
    assert trajectory.finish_reason == "stop"
    assert trajectory.turns == 1
    assert trajectory.state == {"seen": 1}
    assert trajectory.usage == Usage(prompt_tokens=1, completion_tokens=2)
    assert trajectory.tokens is not None
    assert trajectory.tokens.token_ids == (1, 2, 3)
    assert engine.calls[0]["seed"] == 13
    assert environment.closed == [{"seen": 1}]


async def test_turns_share_one_growing_prefix() -> None:
    engine = Recorder()
    trajectory = await act(EXAMPLE, Talk(3), engine, spec(), ordinal=0)
    assert [call["prefix"] for call in engine.calls] == [(), (1, 2, 3), (1, 2, 3, 1, 2, 3)]
    assert trajectory.tokens is not None
    assert trajectory.tokens.loss_mask == (0, 1, 1) * 3
    assert trajectory.usage == Usage(prompt_tokens=1 + 4 + 7, completion_tokens=6)
    assert [len(call["messages"]) for call in engine.calls] == [1, 3, 5]
    assert len({call["seed"] for call in engine.calls}) == 3


async def test_the_stub_engine_gives_tokens_over_turns() -> None:
    trajectory = await act(EXAMPLE, Talk(2), create_stub("stub:?tokens=3", Settings()), spec(), ordinal=0)
    assert trajectory.tokens is not None
    assert trajectory.tokens.loss_mask == (0, 1, 1, 1, 0, 1, 1, 1)


async def test_max_turns_ends_the_rollout_with_the_last_state() -> None:
    trajectory = await act(EXAMPLE, Talk(99), Recorder(), spec(limits={"max_turns": 2}), ordinal=0)
    assert trajectory.finish_reason == "max_turns"
    assert trajectory.turns == 2


async def test_being_done_in_the_last_turn_is_not_max_turns() -> None:
    trajectory = await act(EXAMPLE, Talk(2), Recorder(), spec(limits={"max_turns": 2}), ordinal=0)
    assert trajectory.finish_reason == "stop"


async def test_tools_appear_and_stay_until_changed() -> None:
    class Tools(Talk):
        def step(self, example: Example, session: dict[str, Any], message: Message) -> Observation:
            observation = super().step(example, session, message)
            tools = {1: (TOOL,), 3: ()}.get(session["seen"])
            return observation.model_copy(update={"tools": tools})

    engine = Recorder()
    await act(EXAMPLE, Tools(4), engine, spec(), ordinal=0)
    assert [call["tools"] for call in engine.calls] == [[], [TOOL], [TOOL], []]


async def test_async_environments_are_awaited() -> None:
    class Slow(Talk):
        async def reset(self, example: Example, session: dict[str, Any]) -> Observation:  # type: ignore[override]
            await asyncio.sleep(0)
            return super().reset(example, session)

        async def step(  # type: ignore[override]
            self, example: Example, session: dict[str, Any], message: Message
        ) -> Observation:
            await asyncio.sleep(0)
            return super().step(example, session, message)

        async def close(self, session: dict[str, Any]) -> None:  # type: ignore[override]
            await asyncio.sleep(0)
            super().close(session)

    environment = Slow(2)
    trajectory = await act(EXAMPLE, environment, Recorder(), spec(), ordinal=0)
    assert trajectory.turns == 2
    assert environment.closed == [{"seen": 2}]


@pytest.mark.guarantee("G7")
async def test_a_tool_that_hangs_is_a_timeout_that_names_the_step() -> None:
    class Hangs(Talk):
        async def step(  # type: ignore[override]
            self, example: Example, session: dict[str, Any], message: Message
        ) -> Observation:
            await asyncio.Event().wait()
            raise AssertionError

    environment = Hangs()
    with pytest.raises(StageTimeoutError, match=r"step 1 took longer than tool_timeout \(0.01 s\)"):
        await act(EXAMPLE, environment, Recorder(), spec(limits={"tool_timeout": 0.01}), ordinal=0)
    assert len(environment.closed) == 1


@pytest.mark.parametrize("error", [ValueError("bad move"), TimeoutError("bad move")])
async def test_what_the_environment_raises_is_named(error: Exception) -> None:
    class Raises(Talk):
        async def step(  # type: ignore[override]
            self, example: Example, session: dict[str, Any], message: Message
        ) -> Observation:
            raise error

    environment = Raises()
    with pytest.raises(EnvironmentFailedError, match=rf"step 1 raised {type(error).__name__}: bad move"):
        await act(EXAMPLE, environment, Recorder(), spec(), ordinal=0)
    assert len(environment.closed) == 1


async def test_a_failing_reset_is_closed_too() -> None:
    class Raises(Talk):
        def reset(self, example: Example, session: dict[str, Any]) -> Observation:
            session["opened"] = True
            raise KeyError("prompt")

    environment = Raises()
    with pytest.raises(EnvironmentFailedError, match="reset raised KeyError: 'prompt'"):
        await act(EXAMPLE, environment, Recorder(), spec(), ordinal=0)
    assert environment.closed == [{"opened": True}]


async def test_errors_of_our_tree_pass_unchanged() -> None:
    class Unreachable(Talk):
        def step(self, example: Example, session: dict[str, Any], message: Message) -> Observation:
            raise EnvironmentUnavailableError

    with pytest.raises(EnvironmentUnavailableError):
        await act(EXAMPLE, Unreachable(), Recorder(), spec(), ordinal=0)
    with pytest.raises(EngineUnavailableError):
        await act(EXAMPLE, Talk(), create_stub("stub:?fail=1", Settings()), spec(), ordinal=0)


@pytest.mark.parametrize(
    ("first", "sentence"),
    [
        (Observation(done=True, messages=(ASK,)), "before the model could act"),
        (Observation(), "nothing to answer"),
        ("hello", "returned str instead of an Observation"),
    ],
)
async def test_what_cannot_be_an_opening(first: Any, sentence: str) -> None:
    class Odd(Talk):
        def reset(self, example: Example, session: dict[str, Any]) -> Observation:
            return first  # type: ignore[no-any-return]

    with pytest.raises(EnvironmentFailedError, match=sentence):
        await act(EXAMPLE, Odd(), Recorder(), spec(), ordinal=0)


async def test_cancelling_reaches_the_engine_and_closes_the_session() -> None:
    started = asyncio.Event()

    async def hang() -> None:
        started.set()
        await asyncio.Event().wait()

    environment = Talk()
    task = asyncio.create_task(act(EXAMPLE, environment, Recorder(hang), spec(), ordinal=0))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(environment.closed) == 1


async def test_a_session_that_cannot_be_closed_is_logged_and_costs_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Sticky(Talk):
        def close(self, session: dict[str, Any]) -> None:
            raise OSError("still mounted")

    trajectory = await act(EXAMPLE, Sticky(), Recorder(), spec(), ordinal=0)
    assert trajectory.turns == 1
    assert "could not close" in caplog.text


def test_seeds_differ_by_rollout_and_turn_and_stay_32_bit() -> None:
    assert call_seed(None, 1, 1) is None
    seeds = {call_seed(2**31 - 5, ordinal, turn) for ordinal in range(100) for turn in range(10)}
    assert len(seeds) == 1000
    assert all(seed is not None and 0 <= seed < 2**31 for seed in seeds)
