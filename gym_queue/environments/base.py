"""The contract of an environment: examples, what the world answers, and how to verify.

Subclass ``Environment`` and override what you need; the defaults make a single-turn environment of the example's
messages. Methods may be plain or ``async``; plain ones that take long should be verified in the queue (``inline = False``),
where a worker of their own runs them in a process that can be killed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from gym_queue.records import Message, Record

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gym_queue.records import Example, Trajectory, Verdict


class Observation(Record):
    """What the world shows the model next.

    ``messages`` are appended to the conversation. ``done`` ends the rollout (after ``reset``: never). ``tools`` are the
    OpenAI tool definitions that may be called from now on; ``None`` leaves them as they were.
    """

    messages: tuple[Message, ...] = ()
    done: bool = False
    tools: tuple[dict[str, Any], ...] | None = None
    state: dict[str, Any] = Field(default_factory=dict)


class Environment:
    """Base class of environments. One object serves many rollouts at once: keep state in the ``session`` of a rollout."""

    inline: bool = True
    """Verify in the worker that generated (true), or as a task of its own in the verify queue (false)."""

    def examples(self, size: int, seed: int) -> Iterator[Example]:
        """Yield ``size`` examples. The same size and seed must give the same examples in the same order.

        Only environments that bring their own examples override this; others are fed from JSONL.
        """
        msg = f"{type(self).__name__} brings no examples of its own; give it a JSONL file"
        raise NotImplementedError(msg)

    def reset(self, example: Example, session: dict[str, Any]) -> Observation:
        """Begin a rollout: return the opening messages and tools. ``session`` is this rollout's own, empty dict."""
        raise NotImplementedError

    def step(self, example: Example, session: dict[str, Any], message: Message) -> Observation:
        """Answer one assistant message. The default ends the rollout: a single turn.

        ``state`` of the last observation becomes ``Trajectory.state``: what ``verify`` may need besides messages.
        """
        return Observation(done=True)

    def verify(self, example: Example, trajectory: Trajectory) -> Verdict:
        """Score what the rollout did. Runs in another process than ``step`` when ``inline`` is false.

        Raise ``VerifierError`` (or anything) when it cannot be scored; never return 0 for that.
        """
        raise NotImplementedError

    def close(self, session: dict[str, Any]) -> None:
        """Free what ``reset`` opened. Called once for each ``reset``, whatever happened in between."""
