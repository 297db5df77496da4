"""The contract of an environment: examples, what the world answers, and how to verify.

Subclass ``Environment`` and override what you need; the defaults make a single-turn environment of the
example's messages. ``reset``, ``step``, ``verify`` and ``close`` may be plain or ``async``; a plain
``verify`` that takes long belongs in the queue (``inline`` returns false), where a worker of its own runs it
in a process that can be killed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import unquote

from pydantic import Field

from gym_queue.errors import UsageError
from gym_queue.records import Message, Record

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator

    from gym_queue.records import Example, Trajectory, Verdict


class Observation(Record):
    """What the world shows the model next.

    ``messages`` are appended to the conversation. ``done`` ends the rollout (after ``reset``: never).
    ``tools`` are the OpenAI tool definitions that may be called from now on; ``None`` leaves them as they
    were.
    """

    messages: tuple[Message, ...] = ()
    done: bool = False
    tools: tuple[dict[str, Any], ...] | None = None
    state: dict[str, Any] = Field(default_factory=dict)


class Environment:
    """Base class. One object serves many rollouts at once: keep state in the ``session`` of a rollout."""

    row_fields: ClassVar[frozenset[str] | None] = None
    """Fields of an input row that are read here; others come back in the output. ``None``: it takes all."""

    def inline(self, example: Example) -> bool:
        """Verify in the worker that generated (true), or as a task of its own in the verify queue (false)."""
        return True

    def check(self, example: Example) -> None:
        """Look at an input row before anything starts.

        Raises:
            UsageError: the row lacks what ``reset`` or ``verify`` needs; the message is a sentence about "the
            row".
        """

    def examples(self, size: int, seed: int) -> Iterator[Example]:
        """Yield ``size`` examples. The same size and seed must give the same examples in the same order.

        Only environments that bring their own examples override this; others are fed from JSONL.
        """
        msg = f"{type(self).__name__} brings no examples of its own; give it a JSONL file"
        raise NotImplementedError(msg)

    def reset(self, example: Example, session: dict[str, Any]) -> Observation | Awaitable[Observation]:
        """Begin a rollout: return opening messages and tools. ``session`` is this rollout's own dict."""
        raise NotImplementedError

    def step(
        self, example: Example, session: dict[str, Any], message: Message
    ) -> Observation | Awaitable[Observation]:
        """Answer one assistant message. The default ends the rollout: a single turn.

        ``state`` of the last observation becomes ``Trajectory.state``: what ``verify`` may need besides
        messages.
        """
        return Observation(done=True)

    def verify(self, example: Example, trajectory: Trajectory) -> Verdict | Awaitable[Verdict]:
        """Score what the rollout did. Runs in another process than ``step`` when ``inline`` is false.

        Raise ``VerifierError`` (or anything) when it cannot be scored; never return 0 for that.
        """
        raise NotImplementedError

    def close(self, session: dict[str, Any]) -> Awaitable[None] | None:
        """Free what ``reset`` opened. Called once for each ``reset``, whatever happened in between."""


def final_text(trajectory: Trajectory) -> str:
    """Return the text of the last assistant message; ``""`` when it said nothing (say, a tool call only)."""
    for message in reversed(trajectory.messages):
        if message.get("role") == "assistant":
            content = message.get("content") or ""
            if isinstance(content, str):
                return content
            return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return ""


def parse_name(name: str) -> tuple[str, str, dict[str, str]]:
    """Split ``scheme:target?key=value&key=value`` into scheme, target and options (percent-encoding undone).

    ``+`` stays a plus sign, unlike in web forms: JSON values such as ``["+","-"]`` can be typed as they are.

    Raises:
        UsageError: an option is not ``key=value``, or comes twice.
    """
    address, _, query = name.partition("?")
    scheme, _, target = address.partition(":")
    options: dict[str, str] = {}
    for field in filter(None, query.split("&")):
        key, equals, value = field.partition("=")
        if not key or not equals:
            msg = f"environment {name}: {field!r} is not of the form key=value"
            raise UsageError(msg)
        if unquote(key) in options:
            msg = f"environment {name}: {unquote(key)!r} is given twice"
            raise UsageError(msg)
        options[unquote(key)] = unquote(value)
    return scheme, target, options
