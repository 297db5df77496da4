"""A ledger makes the moves of ``lifecycle.MOVES``, all of them and no others.

A rollout is brought into each state, and there everything is done to it that can be done.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.ledger.base import Ended, Generated, Retry
from gym_queue.lifecycle import MOVES, RolloutState
from gym_queue.records import Fence, Group, Stage, Ticket
from gym_queue.testing import state_of
from tests.contract.ledger_model import LATER, RUN, SPEC, example, fence_of, outcome_of, summary

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gym_queue.ledger.base import Ledger, Outcome

WORKER = "ann"
GENERATED = Generated(payload=b"trajectory")

WAYS: dict[RolloutState, list[str]] = {
    RolloutState.QUEUED: [],
    RolloutState.GENERATING: ["claim"],
    RolloutState.VERIFY_QUEUED: ["claim", "generated"],
    RolloutState.VERIFYING: ["claim", "generated", "claim"],
    RolloutState.SUCCEEDED: ["claim", "succeeded"],
    RolloutState.FAILED: ["claim", "failed"],
    RolloutState.CANCELLED: ["cancel"],
}


class Rollout:
    """Sample 0 of a new example; sample 1 keeps the group open, so that an end stays visible."""

    def __init__(self, ledger: Ledger, index: int) -> None:
        self.ledger = ledger
        self.index = index
        self.tickets = [self.ticket(Stage.GENERATE), self.ticket(Stage.VERIFY)]
        self.fences = [fence_of(ticket, 0, WORKER) for ticket in self.tickets]

    def ticket(self, stage: Stage) -> Ticket:
        return Ticket(stage=stage, run_id=RUN, example_index=self.index, samples=(0,), attempt=1)

    async def bring(self, state: RolloutState) -> None:
        group = Group(example_index=self.index, samples=(0, 1), example=example(self.index))
        await self.ledger.accept(RUN, self.index, self.index + 1, [group])
        tickets, (fence, _) = iter(self.tickets), self.fences
        for step in WAYS[state]:
            match step:
                case "claim":
                    assert await self.ledger.claim(next(tickets), WORKER, LATER)
                case "generated":
                    assert (await self.ledger.commit(fence, GENERATED)).accepted
                case "cancel":
                    assert await self.end("cancelled")
                case end:
                    assert (await self.ledger.commit(fence, self.ended(fence, end))).accepted
        assert await self.state() is state

    async def state(self) -> RolloutState | None:
        return await state_of(self.ledger, RUN, self.index, 0)

    async def end(self, state: str) -> bool:
        return await self.ledger.end(RUN, Ended(summary=summary((self.index, 0), state), row=b"row"))

    @staticmethod
    def ended(fence: Fence, state: Any) -> Outcome:
        return outcome_of(fence, state)

    def deeds(self) -> list[Callable[[], Awaitable[object]]]:
        """Return everything that can be done to it, sensible or not."""
        ledger = self.ledger
        deeds: list[Callable[[], Awaitable[object]]] = [
            partial(self.end, state) for state in ("failed", "cancelled")
        ]
        deeds += [partial(ledger.claim, ticket, "bob", LATER) for ticket in self.tickets]
        for fence in self.fences:
            outcomes: list[Outcome] = [self.ended(fence, "succeeded"), self.ended(fence, "failed")]
            outcomes += [Retry(), Retry(delay=LATER), Retry(counted=False)]
            outcomes += [GENERATED] if fence.stage is Stage.GENERATE else []
            deeds += [partial(ledger.commit, fence, outcome) for outcome in outcomes]
        return deeds


@pytest.mark.parametrize("state", RolloutState)
async def test_a_ledger_makes_the_moves_of_the_table(ledger: Ledger, state: RolloutState) -> None:
    await ledger.open_run(SPEC, "key")
    seen = set()
    count = len(Rollout(ledger, 0).deeds())
    for index in range(count):
        rollout = Rollout(ledger, index)
        await rollout.bring(state)
        await rollout.deeds()[index]()
        seen.add(await rollout.state())
    assert seen - {state} == MOVES[state]
