"""The stub engine: deterministic, cheap, and honest about its options."""

from __future__ import annotations

import asyncio

import pytest

from gym_queue.engines.stub import check, create
from gym_queue.errors import EngineSetupError, EngineUnavailableError
from gym_queue.records import Sampling
from gym_queue.settings import Settings

SETTINGS = Settings()
ASK = ({"role": "user", "content": "2+2"},)


async def test_answers_with_text_ids_and_logprobs() -> None:
    completion = await create("stub:?text=a%20b&tokens=3", SETTINGS).generate(
        ASK, sampling=Sampling(), seed=1
    )
    assert completion.message == {"role": "assistant", "content": "a b"}
    assert completion.finish_reason == "stop"
    assert completion.token_ids is not None
    assert completion.logprobs is not None
    assert len(completion.token_ids) == len(completion.logprobs) == completion.usage.completion_tokens == 3
    assert all(logprob < 0 for logprob in completion.logprobs)


async def test_the_same_call_gives_the_same_answer() -> None:
    first = await create("stub:", SETTINGS).generate(ASK, sampling=Sampling(), seed=1)
    second = await create("stub:", SETTINGS).generate(ASK, sampling=Sampling(), seed=1)
    assert first == second


async def test_the_prompt_extends_the_prefix_by_what_is_new() -> None:
    engine = create("stub:", SETTINGS)
    first = await engine.generate(ASK, sampling=Sampling(), seed=1)
    assert first.prompt_token_ids is not None
    assert first.token_ids is not None
    prefix = first.prompt_token_ids + first.token_ids
    more = (*ASK, first.message, {"role": "user", "content": "and 3+3?"}, {"role": "user", "content": "?"})
    second = await engine.generate(more, sampling=Sampling(), seed=1, prefix=prefix)
    assert second.prompt_token_ids is not None
    assert second.prompt_token_ids[: len(prefix)] == prefix
    assert len(second.prompt_token_ids) == len(prefix) + 2


async def test_max_tokens_cuts() -> None:
    completion = await create("stub:?tokens=5", SETTINGS).generate(
        ASK, sampling=Sampling(max_tokens=2), seed=1
    )
    assert completion.finish_reason == "length"
    assert completion.token_ids is not None
    assert len(completion.token_ids) == 2


async def test_fail_is_a_share_of_calls_and_the_same_calls_every_time() -> None:
    async def failures() -> list[int]:
        engine, failed = create("stub:?fail=0.25", SETTINGS), []
        for seed in range(400):
            try:
                await engine.generate(ASK, sampling=Sampling(), seed=seed)
            except EngineUnavailableError:
                failed.append(seed)
        return failed

    first = await failures()
    assert first == await failures()
    assert 60 <= len(first) <= 140


async def test_delay_sleeps_on_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    await create("stub:?delay=30", SETTINGS).generate(ASK, sampling=Sampling(), seed=1)
    assert slept == [30.0]


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("stub:?fail=2", "`fail`"),
        ("stub:?delay=soon", "`delay`"),
        ("stub:?speed=9", "`speed`.*options are text, tokens, delay, fail"),
        ("stub:fast", "start with"),
    ],
)
def test_wrong_options_are_one_sentence(model: str, sentence: str) -> None:
    with pytest.raises(EngineSetupError, match=sentence) as caught:
        check(model, SETTINGS)
    assert "\n" not in str(caught.value)
