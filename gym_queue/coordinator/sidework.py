"""Work that goes on beside other work, and fails with it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
    from typing import Any

_Result = TypeVar("_Result")


@asynccontextmanager
async def beside(
    *helpers: Coroutine[Any, Any, None],
) -> AsyncIterator[Callable[[Awaitable[_Result]], Awaitable[_Result]]]:
    """Run helpers beside the block, and cancel them when it ends.

    Gives a function that awaits some work and, if a helper fails meanwhile, cancels it and raises the
    helper's error. (A ``TaskGroup`` would raise groups of errors, and could not be left early.)
    """
    tasks = [asyncio.create_task(helper) for helper in helpers]

    async def during(work: Awaitable[_Result]) -> _Result:
        main = asyncio.ensure_future(work)
        running: set[asyncio.Future[Any]] = {main, *tasks}
        try:
            while not main.done():
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                if not main.done():
                    await asyncio.gather(*done)
            return await main
        finally:
            main.cancel()
            await asyncio.gather(main, return_exceptions=True)

    try:
        yield during
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
