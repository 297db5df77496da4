"""What the routes work with. It is made when the head starts, and closed when it stops."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path as File
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import Depends, Path
from starlette.requests import Request

from gym_queue import assembly
from gym_queue.coordinator.driver import Means
from gym_queue.coordinator.leader import Leader
from gym_queue.coordinator.muster import Muster
from gym_queue.coordinator.run_folder import RunFolder
from gym_queue.coordinator.runs import Runs
from gym_queue.fleet.registry import Registry
from gym_queue.head.watching import Watchers
from gym_queue.maintenance.cancel import cancel_run, cancel_samples
from gym_queue.maintenance.survey import FleetMetrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gym_queue.ledger.base import Ledger
    from gym_queue.pipeline import Publisher
    from gym_queue.settings import Settings

_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)

_READERS = 8
_PAUSE = 1.0
_REASON = "the run was cancelled"


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
    metrics: FleetMetrics
    publisher: Publisher
    readers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_READERS, "feeds"))
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

    def folder(self, run_id: str) -> RunFolder:
        """Return the folder of a run, which may not be there."""
        return RunFolder(File(self.settings.runs_dir) / run_id)


async def _of(request: Request) -> HeadServices:  # a plain function would be called in a thread each time
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
    """Make what the routes work with, and lead the runs of the folder while no other head does.

    When the block ends, the runs that this head drives are left to the next one, and its office too.
    """
    async with AsyncExitStack() as stack:
        asked = assembly.make_ledger(settings, patient=False)
        stack.push_async_callback(asked.close)
        driving = assembly.make_ledger(settings)
        stack.push_async_callback(driving.close)
        broker = assembly.make_broker(settings)
        stack.push_async_callback(broker.close)
        runs = Runs(
            asked,
            File(settings.runs_dir),
            settings,
            environments=assembly.make_environment,
            check_model=lambda model: assembly.check_model(model, settings),
            cancel=partial(cancel_run, asked, reason=_REASON),
        )
        stack.push_async_callback(asyncio.to_thread, runs.close_threads)
        registry = Registry(
            asked, heartbeat_interval=settings.worker_heartbeat_interval, timeout=settings.worker_timeout
        )
        services = HeadServices(settings, asked, runs, registry, FleetMetrics(asked, broker), broker)
        stack.callback(services.readers.shutdown)
        means = Means(
            ledger=driving,
            publisher=broker,
            muster=Muster(driving, settings.num_expected_workers),
            window=settings.window,
            environments=assembly.make_environment,
            cancel=partial(cancel_run, driving, reason=_REASON),
            cancel_samples=partial(cancel_samples, driving),
            driving=services.watchers.driving,
        )
        leader = Leader(runs.folder, means, runs.changed)
        runs.on_examples = leader.more_examples
        leading = asyncio.create_task(_lead(leader))
        stack.push_async_callback(_ended, leading)
        yield services


async def _lead(leader: Leader) -> None:
    """Lead until cancelled. What fails is said, and tried again: a head that does not lead is half of one."""
    while True:
        try:
            await leader.run()
        except Exception:  # noqa: BLE001 - whatever it was
            _log.exception("this head failed to lead, and tries again")
            await asyncio.sleep(_PAUSE)


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
