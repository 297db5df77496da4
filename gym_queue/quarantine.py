"""Who may run beside whom in one worker: rollouts whose workers died run with few others, or alone.

A worker that dies takes all its rollouts along, and nobody can tell which of them was why.
``lifecycle.companions`` says how many suspects may run at once; here they wait until that is so. They wait
before their claim, so the death of this worker costs them nothing, and another worker may take them.

Who must run alone closes the door: nobody is let in, and when the last of those inside has left, those that
wait to be alone have their turns, one after the other. Then the door opens for all others that wait; who came
meanwhile and must be alone closes it again behind them. So each waits for those inside and for one round of
the others at most, and nobody waits for ever.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from gym_queue.lifecycle import companions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gym_queue.records import Limits

    _Place = asyncio.Future[None]

_ALONE = 1


class Quarantine:
    """One worker's door. Bound to one event loop.

    Args:
        slots: how many rollouts the worker holds at once. ``None``: a process runs one at a time, and each is
            alone in it anyway.
    """

    def __init__(self, slots: int | None) -> None:
        self._slots = slots
        self._inside = 0
        self._suspects = 0
        self._someone_is_alone = False
        self._to_be_alone: deque[_Place] = deque()
        self._next_round: deque[_Place] = deque()
        self._others: dict[_Place, int | None] = {}

    @asynccontextmanager
    async def admit(self, losses: int, limits: Limits) -> AsyncIterator[None]:
        """Wait until the rollouts of a ticket may run here, and hold their place in the block.

        A ticket counts once: those of several samples have no losses, for what is tried again has a ticket of
        its own.

        Args:
            losses: workers that died with them.
            limits: their run's.
        """
        if self._slots is None:
            yield
            return
        most = companions(losses, self._slots, limits)
        await self._enter(most)
        try:
            yield
        finally:
            self._leave(most)

    async def _enter(self, most: int | None) -> None:
        place: _Place = asyncio.get_running_loop().create_future()
        if most != _ALONE:
            self._others[place] = most
        elif self._someone_is_alone:
            self._next_round.append(place)
        else:
            self._to_be_alone.append(place)
        self._let_in()
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():  # it had not been let in: others may have waited for it alone
                self._let_in()
            else:
                self._leave(most)
            raise

    def _leave(self, most: int | None) -> None:
        self._inside -= 1
        self._suspects -= most is not None and most != _ALONE
        self._someone_is_alone = False  # while somebody is alone, nobody else can leave
        self._let_in()

    def _let_in(self) -> None:
        """Let in whom the rules of the module's docstring allow. Called after every change.

        Places of those who gave up stay in line and are passed over.
        """
        if self._someone_is_alone:
            return
        if not self._waits_to_be_alone():
            for place, most in list(self._others.items()):
                if most is None or self._suspects < most:
                    self._admit(place, most)
            self._to_be_alone, self._next_round = self._next_round, self._to_be_alone
        if self._waits_to_be_alone() and self._inside == 0:
            self._someone_is_alone = True
            self._admit(self._to_be_alone.popleft(), _ALONE)

    def _waits_to_be_alone(self) -> bool:
        """Tell whether somebody does, and has not given up."""
        while self._to_be_alone and self._to_be_alone[0].done():
            self._to_be_alone.popleft()
        return bool(self._to_be_alone)

    def _admit(self, place: _Place, most: int | None) -> None:
        self._others.pop(place, None)
        if place.done():  # it gave up
            return
        place.set_result(None)
        self._inside += 1
        self._suspects += most is not None and most != _ALONE
