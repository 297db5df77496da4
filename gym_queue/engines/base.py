"""The contract of an engine: what turns a conversation into the next assistant message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from gym_queue.records import Message, Record, Usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.records import Sampling, Weights


class Completion(Record):
    """One generation.

    ``finish_reason`` is ``stop``, ``length`` or ``tool_calls``. ``prompt_token_ids`` and ``token_ids`` are
    ``None`` where the engine does not show them; ``logprobs`` has one natural logarithm for each of
    ``token_ids``. ``weight_version`` is that of the weights that sampled them, 0 before any was announced.
    """

    message: Message
    finish_reason: str
    usage: Usage
    prompt_token_ids: tuple[int, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    weight_version: int = 0


class Engine(Protocol):
    """Many coroutines of one event loop call ``generate`` at once; the engine batches them as it can."""

    async def generate(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling,
        seed: int | None,
        tools: Sequence[dict[str, Any]] = (),
        prefix: tuple[int, ...] = (),
    ) -> Completion:
        """Return the next assistant message.

        Args:
            messages: the conversation so far, the last one not from the assistant.
            sampling: how to draw tokens; its ``seed`` is the run's and is not used here.
            seed: this call's own seed, or ``None``.
            tools: OpenAI tool definitions the model may call.
            prefix: token ids of the conversation up to and including the last assistant message, as they were
                sampled; an engine that handles tokens itself must begin its prompt with exactly these ids.
                Empty in the first turn.

        Raises:
            EngineUnavailableError: not reachable or overloaded after its own short retries.
            ModelError: this request cannot be served, and would not be the next time.
            EngineSetupError: the engine cannot serve this run at all.

        Cancelling the call stops the generation.
        """
        ...

    async def load(self, weights: Weights) -> None:
        """Use these weights from the next generation on; returns when they are in use. What runs goes on with
        the weights it began with, and every completion says which those were.

        Many callers at once are one load. Weights not newer than those in use are ignored.

        Raises:
            EngineUnavailableError: they cannot be loaded (not yet, or not here); the others stay in use.
            EngineSetupError: as ``generate``.
        """
        ...

    async def close(self) -> None:
        """Stop background work and free memory."""
        ...
