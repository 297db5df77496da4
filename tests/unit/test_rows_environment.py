"""Rows of plain JSONL: what they ask, who scores them, and which rows are refused."""

from __future__ import annotations

from typing import Any

import pytest

from gym_queue.environments.base import final_text, parse_name
from gym_queue.environments.rows import RowsEnvironment, create
from gym_queue.errors import UsageError
from gym_queue.records import Example, Trajectory, Verdict
from gym_queue.verification.base import Verifier

_ASKED: list[tuple[str, str]] = []


def _note(answer: str, text: str) -> Verdict:
    _ASKED.append((answer, text))
    return Verdict(reward=0.25)


def _rows() -> RowsEnvironment:
    exact = Verifier(score=lambda answer, text: Verdict(reward=float(answer == text)), inline=True)
    return RowsEnvironment({"exact": exact, "slow": Verifier(score=_note, inline=False)})


def _example(row: dict[str, Any]) -> Example:
    return Example(id="a", environment="rows", row=row)


def _said(*contents: Any) -> Trajectory:
    messages = tuple({"role": "assistant", "content": content} for content in contents)
    return Trajectory(messages=messages, finish_reason="stop")


def test_a_prompt_becomes_one_user_message_and_messages_stay() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert _rows().reset(_example({"prompt": "Hi"}), {}).messages == ({"role": "user", "content": "Hi"},)
    assert _rows().reset(_example({"messages": messages}), {}).messages == tuple(messages)


def test_exact_is_the_verifier_where_there_is_an_answer() -> None:
    example = _example({"prompt": "2+2", "answer": "4"})
    assert _rows().verify(example, _said("5", "4")).reward == 1.0
    assert _rows().verify(example, _said("4", "5")).reward == 0.0
    assert _rows().inline(example)


def test_a_named_verifier_gets_answer_and_text_and_may_be_queued() -> None:
    example = _example({"prompt": "2+2", "answer": 4, "verifier": "slow"})
    assert _rows().verify(example, _said("four")).reward == 0.25
    assert _ASKED.pop() == ("4", "four")
    assert not _rows().inline(example)


def test_no_answer_means_no_reward() -> None:
    example = _example({"prompt": "Write a poem"})
    assert _rows().verify(example, _said("roses")) == Verdict(reward=None)
    assert _rows().inline(example)


_USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({}, "neither 'messages' nor 'prompt'"),
        ({"messages": None, "prompt": None}, "neither"),
        ({"messages": [_USER], "prompt": "Hi"}, "both 'messages' and 'prompt'"),
        ({"prompt": ""}, "'prompt' must be text that is not empty"),
        ({"prompt": [_USER]}, "belongs under 'messages'"),
        ({"messages": []}, "at least one message"),
        ({"messages": "Hi"}, "must be a list"),
        ({"messages": ["Hi"]}, "message 1 must be an object, not text"),
        ({"messages": [_USER, {"role": "robot", "content": "Hi"}]}, "message 2 has the role 'robot'"),
        ({"messages": [{"role": "user"}]}, "message 1 has no 'content'"),
        ({"messages": [_USER, {"role": "assistant", "content": "Hi"}]}, "leave the turn to the model"),
        ({"prompt": "Hi", "answer": ["4"]}, "'answer' must be text, a number or a truth value, not a list"),
        ({"prompt": "Hi", "answer": "4", "verifier": 3}, "'verifier' must be a name, not a number"),
        ({"prompt": "Hi", "answer": "4", "verifier": "exat"}, "no verifier 'exat'; did you mean exact"),
        ({"prompt": "Hi", "answer": "4", "verifier": "zzz"}, "there are: exact, slow"),
        ({"prompt": "Hi", "verifier": "exact"}, "the verifier 'exact' needs an 'answer'"),
    ],
)
def test_a_row_that_cannot_run_is_refused_with_a_sentence(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        _rows().check(_example(row))


def test_a_conversation_with_tool_calls_is_taken() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    row = {"messages": [_USER, call, {"role": "tool", "tool_call_id": "1", "content": "4"}], "answer": True}
    _rows().check(_example(row))


def test_rows_takes_no_options() -> None:
    assert isinstance(create("rows", {}), RowsEnvironment)
    with pytest.raises(UsageError, match="neither target nor options"):
        create("rows:extra", {})


def test_the_final_text_is_the_last_assistants() -> None:
    parts = [{"type": "text", "text": "fo"}, {"type": "image_url"}, {"type": "text", "text": "ur"}]
    assert final_text(_said("a", parts)) == "four"
    assert final_text(_said("a", None)) == ""
    assert final_text(Trajectory(messages=(_USER,), finish_reason="stop")) == ""


def test_names_split_into_scheme_target_and_options() -> None:
    assert parse_name('a:b:C?x=1&ops=["+","%26"]&q=a=b') == (
        "a",
        "b:C",
        {"x": "1", "ops": '["+","&"]', "q": "a=b"},
    )
    assert parse_name("rows") == ("rows", "", {})
    for name in ("a:b?x", "a:b?=1", "a:b?x=1&x=2"):
        with pytest.raises(UsageError, match="environment a:b"):
            parse_name(name)
