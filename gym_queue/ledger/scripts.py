"""Runs the ledger's Lua scripts, many callers to a round trip."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from redis.exceptions import NoScriptError, RedisError

from gym_queue.errors import LedgerError
from gym_queue.ledger.edge import passes
from gym_queue.telemetry.story import outside

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.ledger.edge import Edge

    _Command = tuple[Any, ...]

_LARGEST_BATCH = 512
"""Callers. ``commit.lua`` remembers the nonces of twice as many, should the answer be lost."""

_LONGEST_BATCH = 4_000_000
"""Bytes. More would not arrive in time on a slow network, and would be sent again and again."""


_TEXT = (str, bytes)  # `str | bytes` would be made anew for each value

_MOST_MERGED = 128
_LONGEST_MERGED = 1_000_000
"""Callers that share one call of a script, and bytes that they send. Redis does nothing else meanwhile."""


@dataclass(slots=True)
class _Call:
    """One call of a script. ``parts`` are those of the callers who share it (one if ``merged`` is false),
    each with what awaits its answer. ``size`` is in bytes.
    """

    name: str
    keys: Sequence[str]
    args: Sequence[Any]
    parts: list[tuple[Sequence[Any], asyncio.Future[Any]]]
    merged: bool
    size: int

    def command(self, sha: str) -> _Command:
        """Return the whole command."""
        own = [value for part, _ in self.parts for value in part]
        return ("EVALSHA", sha, len(self.keys), *self.keys, *self.args, *own)

    def takes(self, other: _Call) -> bool:
        """Tell whether another call can be one with this one."""
        room = len(self.parts) < _MOST_MERGED and self.size + other.size <= _LONGEST_MERGED
        alike = self.merged and other.merged and room and self.name == other.name
        return alike and self.keys == other.keys and self.args == other.args

    def take(self, other: _Call) -> None:
        """Make another call one with this one."""
        self.parts += other.parts
        self.size += other.size


class Scripts:
    """Runs Lua scripts, many callers to a round trip."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        folder = files("gym_queue.ledger") / "lua"
        self._source = {
            entry.name.removesuffix(".lua"): entry.read_bytes()
            for entry in folder.iterdir()
            if entry.name.endswith(".lua")
        }
        self._sha: dict[str, str] = {}
        self._queue: list[_Call] = []
        self._flusher: asyncio.Task[None] | None = None

    async def run(self, name: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run one script and return its answer. Raises ``LedgerError``."""
        return await self._enqueue(name, keys, args, (), merged=False)

    async def run_merged(
        self, name: str, keys: Sequence[str], shared: Sequence[Any], own: Sequence[Any]
    ) -> Any:
        """Run a script that takes any number of parts behind its ``shared`` arguments, and answers with a
        list, one answer each. Callers at the same time that differ in ``own`` only become one call. Returns
        the answer to ``own``. Raises ``LedgerError``.
        """
        return await self._enqueue(name, keys, shared, own, merged=True)

    async def _enqueue(
        self, name: str, keys: Sequence[str], args: Sequence[Any], own: Sequence[Any], *, merged: bool
    ) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        size = sum([len(value) for value in own or args if isinstance(value, _TEXT)])
        call = _Call(name, keys, args, [(own, future)], merged, size)
        if self._queue and self._queue[-1].takes(call):
            self._queue[-1].take(call)
        else:
            self._queue.append(call)
        if self._flusher is None or self._flusher.done():
            self._flusher = outside(self._flush())
        return await future

    async def _flush(self) -> None:
        while self._queue:
            batch = self._next_batch()
            try:
                answers = await self._edge.call("scripts", partial(self._execute, batch))
            except LedgerError as error:  # those that came meanwhile need not find it out for themselves
                batch, self._queue = batch + self._queue, []
                _fail(batch, error)
            except BaseException as error:
                _fail(batch, error)
                raise
            else:
                for call, answer in zip(batch, answers, strict=True):
                    self._deliver(call, answer)

    def _next_batch(self) -> list[_Call]:
        size, parts, count = 0, 0, 0
        for call in self._queue[:_LARGEST_BATCH]:
            size += call.size
            parts += len(call.parts)
            if count and (size > _LONGEST_BATCH or parts > _LARGEST_BATCH):
                break
            count += 1
        batch, self._queue = self._queue[:count], self._queue[count:]
        return batch

    def _deliver(self, call: _Call, answer: Any) -> None:
        if isinstance(answer, RedisError):
            refusal = self._edge.refusal(call.name, answer)
            refusal.__cause__ = answer
            _fail([call], refusal)
            return
        self._edge.taken(call.name)
        answers = answer if call.merged else [answer]
        for (_, future), own in zip(call.parts, answers, strict=True):
            if not future.done():  # else its caller was cancelled
                future.set_result(own)

    async def _execute(self, batch: Sequence[_Call]) -> list[Any]:
        """Return the answers, errors among them. Raises an error that passes: then all are to be repeated."""
        if not self._sha:
            await self._load()
        answers = await self._pipeline(batch)
        missing = [i for i, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if missing:  # Redis restarted, or another took its place
            await self._load()
            for i, answer in zip(missing, await self._pipeline([batch[i] for i in missing]), strict=True):
                answers[i] = answer
        for answer in answers:
            if isinstance(answer, RedisError) and passes(answer):
                raise answer
        return answers

    async def _pipeline(self, batch: Sequence[_Call]) -> list[Any]:
        return await self._edge.exchange([call.command(self._sha[call.name]) for call in batch])

    async def _load(self) -> None:
        for name, source in self._source.items():
            self._sha[name] = await self._edge.client.script_load(source)


def _fail(batch: Sequence[_Call], error: BaseException) -> None:
    """Give each caller an error of its own: one that is raised in many places collects all their traces."""
    for call in batch:
        for _, future in call.parts:
            if not future.done():
                failure = LedgerError(str(error) or repr(error))
                failure.__cause__ = error
                future.set_exception(failure)
