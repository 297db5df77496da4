"""Runs the ledger's Lua scripts, many callers to a round trip."""

from __future__ import annotations

import asyncio
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

    _Call = tuple[str, tuple[Any, ...], int, asyncio.Future[Any]]

_LARGEST_BATCH = 512
_LONGEST_BATCH = 4_000_000
"""Bytes. More would not arrive in time on a slow network, and would be sent again and again."""


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
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.append((name, (*keys, *args), len(keys), future))
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
        size, count = 0, 0
        for _, arguments, *_ in self._queue[:_LARGEST_BATCH]:
            size += sum(len(part) for part in arguments if isinstance(part, str | bytes))
            if count and size > _LONGEST_BATCH:
                break
            count += 1
        batch, self._queue = self._queue[:count], self._queue[count:]
        return batch

    def _deliver(self, call: _Call, answer: Any) -> None:
        name, *_, future = call
        if isinstance(answer, RedisError):
            refusal = self._edge.refusal(name, answer)
            refusal.__cause__ = answer
            answer = refusal
        else:
            self._edge.taken(name)
        if future.done():  # its caller was cancelled
            return
        if isinstance(answer, LedgerError):
            future.set_exception(answer)
        else:
            future.set_result(answer)

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
        pipeline = self._edge.client.pipeline(transaction=False)
        for name, arguments, keys, _ in batch:
            pipeline.evalsha(self._sha[name], keys, *arguments)
        answers: list[Any] = await pipeline.execute(raise_on_error=False)
        return answers

    async def _load(self) -> None:
        for name, source in self._source.items():
            self._sha[name] = await self._edge.client.script_load(source)


def _fail(batch: Sequence[_Call], error: BaseException) -> None:
    """Give each caller an error of its own: one that is raised in many places collects all their traces."""
    for *_, future in batch:
        if not future.done():
            failure = LedgerError(str(error) or repr(error))
            failure.__cause__ = error
            future.set_exception(failure)
