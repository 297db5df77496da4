"""Environment of plain JSONL rows: a prompt, one answer of the model, and a verifier chosen by name.

A row is ``{"messages" | "prompt", "answer"?, "verifier"?}``. ``prompt`` stands for a single user message.
``verifier`` is ``exact`` where there is an answer; a row without answer is not scored (its reward is
``None``). A field that is ``null`` counts as absent.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

from gym_queue.environments.base import Environment, Observation, final_text
from gym_queue.errors import UsageError, unknown_name
from gym_queue.records import Example, Message, Trajectory, Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gym_queue.verification.base import Verifier

_DEFAULT_VERIFIER = "exact"
_ROLES = ("system", "developer", "user", "assistant", "tool")


def create(name: str, verifiers: Mapping[str, Verifier]) -> RowsEnvironment:
    """Return the environment called ``rows``; it takes no options.

    Raises:
        UsageError: something follows the name.
    """
    if name != "rows":
        msg = f"environment {name}: rows takes neither target nor options"
        raise UsageError(msg)
    return RowsEnvironment(verifiers)


class RowsEnvironment(Environment):
    """See the module's docstring. ``verifiers`` are those that a row may name."""

    row_fields: ClassVar[frozenset[str] | None] = frozenset({"messages", "prompt", "answer", "verifier"})

    def __init__(self, verifiers: Mapping[str, Verifier]) -> None:
        self._verifiers = verifiers

    def check(self, example: Example) -> None:
        """Refuse a row without usable messages, or whose verifier is unknown or lacks an answer."""
        row = example.row
        if (row.get("messages") is None) == (row.get("prompt") is None):
            found = "neither 'messages' nor" if row.get("prompt") is None else "both 'messages' and"
            msg = f"the row has {found} 'prompt'; give one of them"
            raise UsageError(msg)
        if row.get("messages") is not None:
            _check_messages(row["messages"])
        elif not isinstance(row["prompt"], str) or not row["prompt"]:
            msg = "'prompt' must be text that is not empty (a list of messages belongs under 'messages')"
            raise UsageError(msg)
        answer, verifier = row.get("answer"), row.get("verifier")
        if answer is not None and not isinstance(answer, str | int | float):
            msg = f"'answer' must be text, a number or a truth value, not {_kind(answer)}"
            raise UsageError(msg)
        if verifier is None:
            return
        if not isinstance(verifier, str):
            msg = f"'verifier' must be a name, not {_kind(verifier)}"
            raise UsageError(msg)
        if verifier not in self._verifiers:
            raise unknown_name(verifier, self._verifiers, kind="verifier")
        if answer is None:
            msg = f"the verifier {verifier!r} needs an 'answer'"
            raise UsageError(msg)

    def inline(self, example: Example) -> bool:
        """As the row's verifier says; nothing to verify is done at once."""
        verifier = self._verifier(example)
        return verifier is None or verifier.inline

    def reset(self, example: Example, session: dict[str, Any]) -> Observation:
        """Return the row's messages, or its prompt as a user message."""
        if example.row.get("messages") is not None:
            return Observation(messages=tuple(example.row["messages"]))
        return Observation(messages=({"role": "user", "content": example.row["prompt"]},))

    def step(self, example: Example, session: dict[str, Any], message: Message) -> Observation:
        """End the rollout: a row is a single turn."""
        return Observation(done=True)

    def verify(self, example: Example, trajectory: Trajectory) -> Verdict:
        """Score the last assistant message with the row's verifier; a row without one has no reward."""
        verifier = self._verifier(example)
        if verifier is None:
            return Verdict(reward=None)
        answer = example.row["answer"]
        return verifier.score(
            answer if isinstance(answer, str) else json.dumps(answer), final_text(trajectory)
        )

    def _verifier(self, example: Example) -> Verifier | None:
        if example.row.get("answer") is None:
            return None
        return self._verifiers[example.row.get("verifier") or _DEFAULT_VERIFIER]


def _kind(value: object) -> str:
    """Name a JSON value's type for a person."""
    match value:
        case bool():
            return "a truth value"
        case dict():
            return "an object"
        case list():
            return "a list"
        case str():
            return "text"
        case _:
            return "a number"


def _check_messages(messages: object) -> None:
    """Refuse what no chat endpoint would take; the last message must leave the turn to the assistant."""
    if not isinstance(messages, list) or not messages:
        msg = "'messages' must be a list with at least one message"
        raise UsageError(msg)
    for place, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            msg = f"message {place} must be an object, not {_kind(message)}"
            raise UsageError(msg)
        if message.get("role") not in _ROLES:
            msg = f"message {place} has the role {message.get('role')!r}; known are {', '.join(_ROLES)}"
            raise UsageError(msg)
        content = message.get("content")
        calls = message["role"] == "assistant" and message.get("tool_calls")
        if not isinstance(content, str | list) and not (content is None and calls):
            msg = f"message {place} has no 'content' (text or a list of parts)"
            raise UsageError(msg)
    if messages[-1]["role"] == "assistant":
        msg = "the last message is the assistant's own; it must leave the turn to the model"
        raise UsageError(msg)
