"""An engine and a world for tests of groups: who plays is known by its ordinal, and so is what it gets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from gym_queue.engines.base import Completion
from gym_queue.environments.base import final_text
from gym_queue.records import Usage, Verdict
from tests.unit.road import Engine, World

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from gym_queue.records import Example, Message, Trajectory


class Players(Engine):
    """Answers with the ordinal of the rollout (which is its seed if the run's is 0), sampled by ``version``.

    ``hang``: ordinals that never answer. ``fail``: those that raise. ``act``: awaited by all others.
    """

    def __init__(
        self, *, hang: Collection[int] = (), fail: Collection[int] = (), error: Exception | None = None
    ) -> None:
        super().__init__()
        self.hang = hang
        self.fail = fail
        self.error = error or ValueError()
        self.version = 0
        self.begun: list[int] = []
        self.stopped: list[int] = []

    async def generate(self, messages: Sequence[Message], **options: Any) -> Completion:
        ordinal = options["seed"]
        self.begun.append(ordinal)
        version = self.version
        try:
            if ordinal in self.hang:
                await asyncio.Event().wait()
            if self.act:
                await self.act()
        except asyncio.CancelledError:
            self.stopped.append(ordinal)
            raise
        if ordinal in self.fail:
            raise self.error
        return Completion(
            message={"role": "assistant", "content": str(ordinal)},
            finish_reason="stop",
            usage=Usage(),
            prompt_token_ids=(1,),
            token_ids=(2,),
            weight_version=version,
        )


class Referee(World):
    """Gives each player what ``reward`` says."""

    def __init__(self, reward: Callable[[int], float]) -> None:
        super().__init__(inline=True)
        self._reward = reward

    def verify(self, example: Example, trajectory: Trajectory) -> Verdict:
        return Verdict(reward=self._reward(int(final_text(trajectory))))
