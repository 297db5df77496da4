"""The edge between the ledger and Redis. Every call passes here: it is repeated while that may help, the
driver's errors become ours, and what is wrong is said once, not by each call.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import re
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from redis.exceptions import AuthenticationError, AuthorizationError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from gym_queue.errors import LedgerError, redis_refusal
from gym_queue.ledger.connection import Link

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from gym_queue.ledger.connection import Patience

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_Self = TypeVar("_Self")
_Arguments = ParamSpec("_Arguments")

_CALLS_AT_ONCE = 16
"""Connections. Enough for readers that wait beside writers; callers past that queue up."""

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0

_PASSING = re.compile(
    "read only replica|READONLY|Link with MASTER|MASTERDOWN|UNBLOCKED|TRYAGAIN|NOREPLICAS|BUSY "
)
"""What Redis says in the middle of a failover, or while it is stuck in somebody's script."""


class Notice:
    """What this process has said about one Redis. Threads may share it: at worst a line is said twice."""

    def __init__(self) -> None:
        self._away = False
        self._refused: dict[str, str] = {}

    def away(self, sentence: str) -> None:
        """Redis gives no answer, to anybody."""
        if not self._away:
            self._away = True
            _log.warning("%s; waiting", sentence)

    def refused(self, call: str, sentence: str) -> None:
        """Redis answers, but refuses this call."""
        if sentence not in self._refused.values():
            _log.warning("%s; waiting", sentence)
        self._refused[call] = sentence

    def answered(self, call: str) -> None:
        """Redis answered this call. What it was refused for is over, for others as well."""
        if self._away:
            self._away = False
            _log.warning("Redis answers again")
        over = self._refused.get(call)
        if over is not None:
            self._refused = {name: why for name, why in self._refused.items() if why != over}
            _log.warning("Redis takes calls again")


_NOTICES: dict[str, Notice] = {}
"""By URL. All ledgers of a process share them: one outage is one line."""


class Edge:
    """Calls to one Redis. Bound to the event loop that first uses it."""

    def __init__(self, url: str, patience: Patience) -> None:
        self.patience = patience
        self._link = Link(url, patience)
        self._notice = _NOTICES.setdefault(url, Notice())
        self._slots = asyncio.Semaphore(_CALLS_AT_ONCE)

    @property
    def client(self) -> Any:
        """The driver's client. Its calls are made inside ``call``."""
        return self._link.client

    async def exchange(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """See ``Link.exchange``. To be called inside ``call``."""
        return await self._link.exchange(commands)

    async def call(self, name: str, do: Callable[[], Awaitable[_Result]]) -> _Result:
        """Return what ``do`` returns. It is repeated until Redis answers or patience is over, so it must be
        safe to repeat even where Redis did it and only the answer was lost.

        Raises:
            LedgerError: Redis did not answer, or refused.
        """
        clock = asyncio.get_running_loop().time
        give_up, pause, failures = math.inf, _FIRST_PAUSE, 0
        while True:
            try:
                answer = await self._answer(do)
            except RedisError as error:
                if not passes(error):
                    raise self.refusal(name, error) from error
                failures += 1
                give_up = min(give_up, clock() + self.patience.repeat)
                if not isinstance(
                    error, RedisConnectionError
                ):  # the others reach the same deaf or demoted Redis
                    await self._link.drop_idle()
                elif failures == 1:
                    continue  # one connection broke: that is no outage yet
                sentence = f"Redis does not answer ({error})"
                self._notice.away(sentence)
                if clock() >= give_up:
                    raise LedgerError(sentence) from error
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                self.taken(name)
                return answer

    async def _answer(self, do: Callable[[], Awaitable[_Result]]) -> _Result:
        async with self._slots:
            try:
                async with asyncio.timeout(self.patience.answer):
                    return await do()
            except TimeoutError as expiry:
                msg = f"no answer within {self.patience.answer:g} s"
                raise RedisTimeoutError(msg) from expiry

    def refusal(self, name: str, error: RedisError) -> LedgerError:
        """Return our error for a call that Redis answered with an error of its own."""
        sentence = redis_refusal(str(error)) or f"Redis: {error}"
        self._notice.refused(name, sentence)
        return LedgerError(sentence)

    def taken(self, name: str) -> None:
        """Note that Redis took a call."""
        self._notice.answered(name)

    async def close(self) -> None:
        """Close all connections."""
        await self._link.close()


def passes(error: Exception) -> bool:
    """Tell whether the same call may be answered in a moment."""
    if any(isinstance(one, AuthenticationError | AuthorizationError) for one in (error, error.__cause__)):
        return False  # the driver wraps it where it happens while connecting
    if isinstance(error, RedisConnectionError | RedisTimeoutError):
        return True
    return _PASSING.search(str(error)) is not None


def at_the_edge(
    method: Callable[Concatenate[_Self, _Arguments], Awaitable[_Result]],
) -> Callable[Concatenate[_Self, _Arguments], Coroutine[Any, Any, _Result]]:
    """Make a method one call of its object's ``_edge``: it is repeated as a whole."""

    @wraps(method)
    async def call(self: _Self, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        edge: Edge = self._edge  # type: ignore[attr-defined]
        return await edge.call(method.__name__, partial(method, self, *args, **kwargs))

    return call
