"""Runs the ledger's Lua scripts, many callers to a round trip."""

from __future__ import annotations

import asyncio
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import redis.asyncio as aioredis

_LARGEST_BATCH = 512


class Scripts:
    """Runs Lua scripts, many callers to a round trip."""

    def __init__(self, client: aioredis.Redis) -> None:
        self._client = client
        folder = files("gym_queue.ledger") / "lua"
        self._source = {
            entry.name.removesuffix(".lua"): entry.read_bytes()
            for entry in folder.iterdir()
            if entry.name.endswith(".lua")
        }
        self._sha: dict[str, str] = {}
        self._queue: list[tuple[str, tuple[Any, ...], int, asyncio.Future[Any]]] = []
        self._flusher: asyncio.Task[None] | None = None

    async def run(self, name: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run one script and return its answer. Raises ``RedisError``."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.append((name, (*keys, *args), len(keys), future))
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        return await future

    async def _flush(self) -> None:
        while self._queue:
            batch, self._queue = self._queue[:_LARGEST_BATCH], self._queue[_LARGEST_BATCH:]
            try:
                answers = await self._execute(batch)
            except BaseException as error:
                for *_, future in batch:
                    if not future.done():
                        future.set_exception(
                            error if isinstance(error, RedisError) else RedisConnectionError(repr(error))
                        )
                if not isinstance(error, RedisError):
                    raise
                continue
            for (*_, future), answer in zip(batch, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    async def _execute(self, batch: Sequence[tuple[str, tuple[Any, ...], int, Any]]) -> list[Any]:
        if not self._sha:
            await self._load()
        answers = await self._pipeline(batch)
        missing = [i for i, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if missing:  # Redis restarted and forgot them
            await self._load()
            for i, answer in zip(missing, await self._pipeline([batch[i] for i in missing]), strict=True):
                answers[i] = answer
        return answers

    async def _pipeline(self, batch: Sequence[tuple[str, tuple[Any, ...], int, Any]]) -> list[Any]:
        if len(batch) == 1:
            name, arguments, keys, _ = batch[0]
            try:
                return [await self._client.evalsha(self._sha[name], keys, *arguments)]
            except NoScriptError as error:
                return [error]
        pipeline = self._client.pipeline(transaction=False)
        for name, arguments, keys, _ in batch:
            pipeline.evalsha(self._sha[name], keys, *arguments)
        return await pipeline.execute(raise_on_error=False)

    async def _load(self) -> None:
        for name, source in self._source.items():
            self._sha[name] = await self._client.script_load(source)
