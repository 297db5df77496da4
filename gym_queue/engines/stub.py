"""The engine without a model: ``stub:`` answers at once and always the same, for tests and benchmarks.

Options look like a URL's query, ``stub:?text=42&delay=0.5``:

- ``text`` (``ok``): the answer.
- ``tokens`` (``8``): how many token ids the answer has; made up, they have nothing to do with ``text``.
- ``delay`` (``0``): seconds that a call sleeps, as a call to a real model would wait.
- ``fail`` (``0``): share of calls in [0, 1] that raise ``EngineUnavailableError``. A digest of seed and
  messages decides, so the same call fails every time.

A prompt is one token a message, so a rollout of several turns has a loss mask with holes, like a real one.
"""

from __future__ import annotations

import asyncio
import zlib
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from pydantic import Field, ValidationError

from gym_queue.engines.base import Completion
from gym_queue.errors import EngineSetupError, EngineUnavailableError
from gym_queue.records import Message, Record, Usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.records import Sampling, Weights
    from gym_queue.settings import Settings

_VOCABULARY = 30_000


class StubOptions(Record):
    """What stands behind ``stub:``; see the module's docstring."""

    text: str = "ok"
    tokens: int = Field(default=8, ge=1)
    delay: float = Field(default=0.0, ge=0.0)
    fail: float = Field(default=0.0, ge=0.0, le=1.0)


class StubEngine:
    """See the module's docstring. A call costs microseconds: what does not depend on it is made once."""

    def __init__(self, options: StubOptions) -> None:
        self._options = options
        self._version = 0
        self._message: Message = {"role": "assistant", "content": options.text}
        self._token_ids = tuple(_VOCABULARY + place for place in range(options.tokens))
        self._logprobs = tuple(-(1 + place % 4) / 4 for place in range(options.tokens))

    async def generate(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling,
        seed: int | None,
        tools: Sequence[dict[str, Any]] = (),
        prefix: tuple[int, ...] = (),
    ) -> Completion:
        """Return the answer; ``max_tokens`` cuts its token ids, as a real engine would."""
        del tools
        options, version = self._options, self._version
        if options.delay:
            await asyncio.sleep(options.delay)
        if options.fail and _digest(seed, messages) < options.fail:
            msg = "the stub engine failed, as its option `fail` asks it to"
            raise EngineUnavailableError(msg)
        prompt = prefix + tuple(_token(message) for message in _unseen(messages, prefix))
        count = min(options.tokens, sampling.max_tokens)
        return Completion(
            message=dict(self._message),
            finish_reason="length" if count < options.tokens else "stop",
            usage=Usage(prompt_tokens=len(prompt), completion_tokens=count),
            prompt_token_ids=prompt,
            token_ids=self._token_ids[:count],
            logprobs=self._logprobs[:count],
            weight_version=version,
        )

    async def load(self, weights: Weights) -> None:
        """Note the version; completions that begin from now on carry it."""
        self._version = max(self._version, weights.version)

    async def close(self) -> None:
        """Do nothing: there is nothing to free."""


def create(model: str, settings: Settings) -> StubEngine:
    """Make the engine that ``model`` (``stub:`` with its options) describes."""
    del settings
    return StubEngine(_options(model))


def check(model: str, settings: Settings) -> None:
    """Refuse options that do not exist or make no sense."""
    del settings
    _options(model)


def _options(model: str) -> StubOptions:
    rest = model.removeprefix("stub:")
    if rest and not rest.startswith("?"):
        msg = f"the model {model!r} is not understood: options of the stub engine start with `stub:?`"
        raise EngineSetupError(msg)
    try:
        return StubOptions.model_validate(dict(parse_qsl(rest[1:], keep_blank_values=True)))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        known = ", ".join(StubOptions.model_fields)
        msg = f"the model {model!r} has a wrong option `{name}` ({first['msg']}); options are {known}"
        raise EngineSetupError(msg) from error


def _unseen(messages: Sequence[Message], prefix: tuple[int, ...]) -> Sequence[Message]:
    """Return the messages that ``prefix`` does not cover: those after the last one of the assistant."""
    if not prefix:
        return messages
    start = len(messages)
    while start and messages[start - 1].get("role") != "assistant":
        start -= 1
    return messages[start:]


def _token(message: Message) -> int:
    return zlib.crc32(str(message.get("content")).encode()) % _VOCABULARY


def _digest(seed: int | None, messages: Sequence[Message]) -> float:
    """Map a call to a number in [0, 1) that looks random and is the same in every process."""
    return zlib.crc32(repr((seed, list(messages))).encode()) / 2**32
