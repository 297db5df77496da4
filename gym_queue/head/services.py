"""What the routes work with. It is made when the head starts, and closed when it stops."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path as Folder
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Path
from starlette.requests import Request

from gym_queue.fleet.registry import Registry
from gym_queue.head.tally import Tallies
from gym_queue.head.watching import Watchers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gym_queue.coordinator.runs import Runs
    from gym_queue.ledger.base import Ledger
    from gym_queue.settings import Settings


@dataclass
class HeadServices:
    """What the routes of one head share.

    Attributes:
        ledger: one that does not wait for a Redis that is away: a client hears of it, and comes again.
        stopping: set when the head begins to stop; feeds end then.
    """

    settings: Settings
    ledger: Ledger
    runs: Runs
    registry: Registry
    watchers: Watchers = field(default_factory=Watchers)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    def stop(self) -> None:
        """Begin to stop: whoever waits for news goes on."""
        self.stopping.set()
        self.watchers.wake()

    def folder(self, run_id: str) -> Folder:
        """Return where a run's files are."""
        return Folder(self.settings.runs_dir) / run_id


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


OUTPUT = "rollouts.jsonl"
"""The output of a run, in its folder."""


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[HeadServices]:
    """Make what the routes work with, and lead runs while nobody else does."""
    yield None
