"""What the routes work with. It is made when the head starts, and closed when it stops."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import Depends, Path
from starlette.requests import Request

from gym_queue.fleet.registry import Registry
from gym_queue.head.tally import Tallies
from gym_queue.head.watching import Watchers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gym_queue.coordinator.runs import Runs
    from gym_queue.ledger.base import Ledger
    from gym_queue.settings import Settings

_Result = TypeVar("_Result")

_READERS = 8


@dataclass
class HeadServices:
    """What the routes of one head share.

    Attributes:
        ledger: one that does not wait for a Redis that is away: a client hears of it, and comes again.
        readers: threads for reading feeds, which must not wait for those who search whole files.
        stopping: set when the head begins to stop; feeds end then.
    """

    settings: Settings
    ledger: Ledger
    runs: Runs
    registry: Registry
    readers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_READERS, "feeds"))
    tallies: Tallies = field(default_factory=Tallies)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.watchers = Watchers(self.readers)

    def stop(self) -> None:
        """Begin to stop: whoever waits for news goes on."""
        self.stopping.set()
        self.watchers.wake()

    async def read(self, do: Callable[..., _Result], /, *arguments: Any) -> _Result:
        """Read something quickly, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, do, *arguments)

    def output(self, run_id: str) -> File:
        """Return where a run's rows are."""
        return File(self.settings.runs_dir) / run_id / "rollouts.jsonl"


def _of(request: Request) -> HeadServices:
    services: HeadServices = request.app.state.services
    return services


Services = Annotated[HeadServices, Depends(_of)]

RunId = Annotated[
    str,
    Path(
        description="The run's id.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        examples=["20261120-223109-4eeff0ca"],
    ),
]


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[HeadServices]:
    """Make what the routes work with, and lead runs while nobody else does."""
    yield None
