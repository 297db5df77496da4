"""The conversation as token ids, gathered turn by turn from what the engine says it read and sampled."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gym_queue.records import Tokens

if TYPE_CHECKING:
    from gym_queue.engines.base import Completion

_log = logging.getLogger(__name__)

_NOT_SAMPLED = -1
"""Weight version of a token that no weights sampled."""


class TokenLog:
    """Appends each turn's tokens, and never guesses.

    The prompt of a turn must begin with every id gathered so far; what follows is what the environment
    added (mask 0), then come the sampled ids (mask 1). An endpoint that re-tokenises the conversation (its
    template drops earlier thinking, or glues text another way) breaks that: a list in which the policy did
    not see what it seems to have seen would poison training silently, so the whole rollout is kept without
    tokens. The same holds where a turn comes without ids. Logprobs alone may be missing; then they are
    missing as a whole.
    """

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._loss_mask: list[int] = []
        self._weight_version: list[int] = []
        self._complete = True
        self._scored = True

    @property
    def prefix(self) -> tuple[int, ...]:
        """The ids so far, for the engine to begin its next prompt with; empty where there are none."""
        return tuple(self._token_ids) if self._complete else ()

    def append(self, completion: Completion) -> None:
        """Take in one turn."""
        if not self._complete:
            return
        prompt, sampled = completion.prompt_token_ids, completion.token_ids
        known = len(self._token_ids)
        if prompt is None or sampled is None:
            self._complete = False
            return
        if list(prompt[:known]) != self._token_ids:
            _log.debug("the engine re-tokenised the conversation; this rollout is kept without token ids")
            self._complete = False
            return
        self._extend(prompt[known:], sampled=False, weight_version=_NOT_SAMPLED, logprobs=None)
        self._extend(
            sampled, sampled=True, weight_version=completion.weight_version, logprobs=completion.logprobs
        )

    def _extend(
        self, ids: tuple[int, ...], *, sampled: bool, weight_version: int, logprobs: tuple[float, ...] | None
    ) -> None:
        self._token_ids += ids
        self._loss_mask += [int(sampled)] * len(ids)
        self._weight_version += [weight_version] * len(ids)
        if logprobs is not None and len(logprobs) == len(ids):
            self._logprobs += logprobs
        else:
            self._logprobs += [0.0] * len(ids)
            self._scored = self._scored and not sampled

    def tokens(self) -> Tokens | None:
        """Return all turns as one record; ``None`` where ids are missing or contradict each other."""
        if not self._complete or not self._token_ids:
            return None
        return Tokens(
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs) if self._scored else None,
            loss_mask=tuple(self._loss_mask),
            weight_version=tuple(self._weight_version),
        )
