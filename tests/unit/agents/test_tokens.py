"""Tokens gathered over turns: exactly what was sampled, or nothing."""

from __future__ import annotations

from gym_queue.agents.tokens import TokenLog
from gym_queue.engines.base import Completion
from gym_queue.records import Usage


def completion(
    prompt: tuple[int, ...] | None,
    sampled: tuple[int, ...] | None,
    logprobs: tuple[float, ...] | None = None,
    weight_version: int = 0,
) -> Completion:
    return Completion(
        message={"role": "assistant", "content": ""},
        finish_reason="stop",
        usage=Usage(),
        prompt_token_ids=prompt,
        token_ids=sampled,
        logprobs=logprobs,
        weight_version=weight_version,
    )


def test_turns_are_appended_with_their_mask_and_weights() -> None:
    log = TokenLog()
    log.append(completion((1, 2), (3, 4), (-0.5, -0.25), weight_version=7))
    assert log.prefix == (1, 2, 3, 4)
    log.append(completion((1, 2, 3, 4, 5), (6,), (-1.0,), weight_version=8))
    tokens = log.tokens()
    assert tokens is not None
    assert tokens.token_ids == (1, 2, 3, 4, 5, 6)
    assert tokens.loss_mask == (0, 0, 1, 1, 0, 1)
    assert tokens.logprobs == (0.0, 0.0, -0.5, -0.25, 0.0, -1.0)
    assert tokens.weight_version == (-1, -1, 7, 7, -1, 8)


def test_a_retokenised_prompt_leaves_no_tokens_for_good() -> None:
    log = TokenLog()
    log.append(completion((1, 2), (3, 4), (0.0, 0.0)))
    log.append(completion((1, 2, 9, 4, 5), (6,), (0.0,)))
    assert log.tokens() is None
    assert log.prefix == ()
    log.append(completion((1, 2, 9, 4, 5, 6), (7,), (0.0,)))
    assert log.tokens() is None


def test_a_prompt_shorter_than_what_was_sampled_leaves_no_tokens() -> None:
    log = TokenLog()
    log.append(completion((1, 2), (3, 4), (0.0, 0.0)))
    log.append(completion((1, 2, 3), (6,), (0.0,)))
    assert log.tokens() is None


def test_a_turn_without_ids_leaves_no_tokens() -> None:
    for missing in (completion(None, (3,)), completion((1,), None)):
        log = TokenLog()
        log.append(missing)
        assert log.tokens() is None
        assert log.prefix == ()


def test_logprobs_are_all_or_nothing() -> None:
    log = TokenLog()
    log.append(completion((1,), (2,), (-0.5,)))
    log.append(completion((1, 2), (3, 4), (-0.5,)))
    tokens = log.tokens()
    assert tokens is not None
    assert tokens.token_ids == (1, 2, 3, 4)
    assert tokens.logprobs is None


def test_no_turns_no_tokens() -> None:
    assert TokenLog().tokens() is None
