"""From messages to prompt ids and back, with a Hugging Face tokenizer: for engines that handle tokens.

The ids that a model sampled are kept as they are, whatever its template would make of their text. So the
prompt of a later turn is ``prefix`` (all ids so far) plus the template's text *after* the last assistant
message. That text is found by rendering the conversation once with a marker in the place of that message's
content: nothing is assumed about what the template does with the message itself (Qwen3's drops earlier
thinking, others trim).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from gym_queue.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gym_queue.records import Message

_MARKER = "gymqueuemarker7f3a"
_TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


class ChatTemplate:
    """A tokenizer with its chat template.

    Args:
        tokenizer: of transformers, with a chat template.
        stop_ids: ids that end the model's turn.
    """

    def __init__(self, tokenizer: Any, stop_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._stop_texts = [tokenizer.decode([stop]) for stop in self._stop_ids]

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], prefix: tuple[int, ...]
    ) -> list[int]:
        """Return the ids to generate from; they begin with ``prefix``.

        Raises:
            ModelError: the template refuses this conversation.
        """
        last = _last_assistant(messages) if prefix else None
        if last is None:
            return self._encode(self._render(messages, tools))
        return [*prefix, *self._encode(self._after(messages, last, tools, prefix))]

    def message(self, token_ids: Sequence[int], *, parse_tools: bool, call_prefix: str) -> Message:
        """Return sampled ids (without the one that ended them) as an assistant message.

        With ``parse_tools``, calls in the layout of Hermes and Qwen, JSON with ``name`` and ``arguments``
        between ``<tool_call>`` and ``</tool_call>``, become ``tool_calls``; their ids begin with
        ``call_prefix``. What is not valid JSON stays in the content.
        """
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return _with_tool_calls(text, call_prefix) if parse_tools else {"role": "assistant", "content": text}

    def _after(
        self,
        messages: Sequence[Message],
        last: int,
        tools: Sequence[dict[str, Any]],
        prefix: tuple[int, ...],
    ) -> str:
        """Return the text between what assistant message ``last`` sampled and the next reply.

        It begins with the end of that message's turn: left out where the model sampled it, kept where the
        model was cut off before it.
        """
        marked = _marked(messages[last])
        text = self._render([*messages[:last], marked, *messages[last + 1 :]], tools)
        before, found, after = text.rpartition(_MARKER)
        if not found or _MARKER in before:
            msg = "the chat template does not show an assistant's message once, so no turn can follow it"
            raise ModelError(msg)
        ends = [(after.find(stop), stop) for stop in self._stop_texts if stop in after]
        if marked.get("tool_calls") and ends:  # skip what closes the call itself
            after = after[min(ends)[0] :]
        if prefix[-1] not in self._stop_ids:
            return after
        ending = next((stop for stop in self._stop_texts if after.startswith(stop)), "")
        return after[len(ending) :]

    def _render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [_for_template(message) for message in messages],
                tools=list(tools) or None,
                add_generation_prompt=True,
                tokenize=False,
            )
        except Exception as error:  # a template is a program of its author; it may raise anything
            msg = f"the chat template refuses this conversation: {' '.join(str(error).split())}"
            raise ModelError(msg) from error
        return str(text)

    def _encode(self, text: str) -> list[int]:
        """Tokenise rendered text; the template has written every special token itself."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _last_assistant(messages: Sequence[Message]) -> int | None:
    places = (place for place, message in enumerate(messages) if message.get("role") == "assistant")
    return max(places, default=None)


def _marked(message: Message) -> Message:
    """Return the message with a marker as its last text.

    That is its content or, where it calls tools, the arguments of the last call (templates look at earlier
    calls when they render a tool's answer, so calls cannot be left out).
    """
    calls = message.get("tool_calls")
    if not calls:
        return {"role": "assistant", "content": _MARKER}
    function = {**calls[-1]["function"], "arguments": {_MARKER: ""}}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [*calls[:-1], {**calls[-1], "function": function}],
    }


def _for_template(message: Message) -> Message:
    """Return a message as templates want it: arguments of tool calls as objects, not as JSON in a string."""
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_decoded_call(call) for call in message["tool_calls"]]}


def _decoded_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except (TypeError, ValueError):  # an object already, or text that only its author understands
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _with_tool_calls(text: str, call_prefix: str) -> Message:
    calls: list[dict[str, Any]] = []

    def take(match: re.Match[str]) -> str:
        try:
            call = json.loads(match[1])
            function = {"name": str(call["name"]), "arguments": json.dumps(call.get("arguments") or {})}
        except (ValueError, KeyError, TypeError, AttributeError):
            return match[0]
        calls.append({"id": f"{call_prefix}{len(calls)}", "type": "function", "function": function})
        return ""

    content = _TOOL_CALL.sub(take, text)
    if not calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": content.strip(), "tool_calls": calls}
