"""Prompt ids over several turns: what was sampled stays, and only what the template adds is tokenised."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.engines.chat_template import ChatTemplate
from gym_queue.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

END = 1
USER = {"role": "user", "content": "2+2?"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "add", "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c", "type": "function", "function": function}],
    }


@pytest.fixture
def chat_with(tokenizer_for: Callable[[str], Any]) -> Callable[[str], Chat]:
    return lambda template: Chat(tokenizer_for(template))


@pytest.fixture
def chatml(chat_with: Callable[[str], Chat]) -> Chat:
    return chat_with("chatml")


class Chat:
    """A template with its tokenizer, and one conversation on it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(self.tokenizer, [END])

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def second_turn(
        self, reply: str, message: dict[str, Any], *news: dict[str, Any], ended: bool = True
    ) -> str:
        """Return the text that the second turn's prompt adds to what the first turn read and sampled."""
        first = self.template.prompt_ids([USER], [], ())
        prefix = (*first, *self.ids(reply), *([END] if ended else []))
        second = self.template.prompt_ids([USER, message, *news], [], prefix)
        assert tuple(second[: len(prefix)]) == prefix
        return str(self.tokenizer.decode(second[len(prefix) :]))


def test_the_first_prompt_is_the_templates(chat_with: Callable[[str], Chat]) -> None:
    chat = chat_with("chatml")
    ids = chat.template.prompt_ids([USER], TOOLS, ())
    assert (
        ids
        == chat.tokenizer.apply_chat_template(
            [USER], tools=TOOLS, add_generation_prompt=True, return_dict=True
        )["input_ids"]
    )


NEXT = {"role": "user", "content": "and 3+3?"}
CHATML_TAIL = "\n<|im_start|>user\nand 3+3?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("source", ["chatml", "qwen3"])
@pytest.mark.parametrize("reply", ["4", " 4 \n", "<think>\nhm\n</think>\n\n4", "", "gymqueue"])
def test_a_reply_stays_as_it_was_sampled(chat_with: Callable[[str], Chat], source: str, reply: str) -> None:
    """Trimmed white space and dropped thinking would show as another prefix, or as text twice."""
    added = chat_with(source).second_turn(reply, {"role": "assistant", "content": reply}, NEXT)
    assert added == CHATML_TAIL


def test_without_a_newline_after_the_end(chat_with: Callable[[str], Chat]) -> None:
    added = chat_with("bare").second_turn("4", {"role": "assistant", "content": "4"}, NEXT)
    assert added == "[user]and 3+3?<|im_end|>[assistant]"


@pytest.mark.parametrize(("source", "tail"), [("chatml", CHATML_TAIL), ("qwen3", CHATML_TAIL)])
def test_a_reply_that_was_cut_off_is_ended(chat_with: Callable[[str], Chat], source: str, tail: str) -> None:
    added = chat_with(source).second_turn("4 is", {"role": "assistant", "content": "4 is"}, NEXT, ended=False)
    assert added == "<|im_end|>" + tail


TOOL_TAILS = {
    "chatml": "\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n",
    "qwen3": "\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    "bare": "[tool]4<|im_end|>[assistant]",
}


@pytest.mark.parametrize(("source", "tail"), TOOL_TAILS.items())
@pytest.mark.parametrize("ended", [True, False])
def test_a_tools_answer_follows_the_call_as_sampled(
    chat_with: Callable[[str], Chat], source: str, tail: str, *, ended: bool
) -> None:
    """One of these templates refuses a tool's answer without the call before it."""
    answer = {"role": "tool", "tool_call_id": "c", "content": "4"}
    added = chat_with(source).second_turn("<tool_call>…", call('{"a": 2}'), answer, ended=ended)
    assert added == ("" if ended else "<|im_end|>") + tail


def test_arguments_reach_the_template_as_objects(chat_with: Callable[[str], Chat]) -> None:
    chat = chat_with("chatml")
    text = chat.tokenizer.decode(chat.template.prompt_ids([USER, call('{"a": 2}'), NEXT], [], ()))
    assert '"arguments": {"a": 2}' in text
    text = chat.tokenizer.decode(chat.template.prompt_ids([USER, call("{a: 2"), NEXT], [], ()))
    assert '"arguments": "{a: 2"' in text


def test_three_turns(chat_with: Callable[[str], Chat]) -> None:
    chat = chat_with("qwen3")
    messages: list[dict[str, Any]] = [USER]
    prefix: tuple[int, ...] = ()
    for reply in ("<think>\na\n</think>\n\n4", "<think>\nb\n</think>\n\n6", "8"):
        prefix = (*chat.template.prompt_ids(messages, [], prefix), *chat.ids(reply), END)
        messages += [{"role": "assistant", "content": reply}, NEXT]
    text = chat.tokenizer.decode(prefix)
    assert text.count("<think>") == 2
    assert text.count("<|im_start|>assistant") == 3


def test_a_template_that_refuses_is_the_models_failure(chat_with: Callable[[str], Chat]) -> None:
    answer = {"role": "tool", "content": "4"}
    with pytest.raises(ModelError, match="refuses this conversation: a tool answers, but nobody called it"):
        chat_with("bare").template.prompt_ids([USER, answer], [], ())


def test_a_template_that_hides_the_reply_cannot_be_continued(chat_with: Callable[[str], Chat]) -> None:
    hides = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(ModelError, match="no turn can follow"):
        chat_with(hides).second_turn("4", {"role": "assistant", "content": "4"}, NEXT)


def parsed(chat: Chat, text: str, *, parse_tools: bool = True) -> dict[str, Any]:
    return chat.template.message(chat.ids(text), parse_tools=parse_tools, call_prefix="call_")


def test_tool_calls_become_the_openai_layout(chatml: Chat) -> None:
    message = parsed(
        chatml,
        'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>\n'
        '<tool_call>{"name": "now"}</tool_call>',
    )
    assert message["content"] == "Let me see."
    assert [entry["id"] for entry in message["tool_calls"]] == ["call_0", "call_1"]
    first, second = (entry["function"] for entry in message["tool_calls"])
    assert first["name"] == "add"
    assert json.loads(first["arguments"]) == {"a": 2}
    assert second == {"name": "now", "arguments": "{}"}


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{not json}</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": "add"}',
    ],
)
def test_what_is_no_call_stays_as_content(chatml: Chat, text: str) -> None:
    assert parsed(chatml, text) == {"role": "assistant", "content": text}


def test_calls_are_only_read_where_tools_were_given(chatml: Chat) -> None:
    text = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    assert parsed(chatml, text, parse_tools=False) == {"role": "assistant", "content": text}
