"""A run's files as its coordinator writes them, for the tests of those who read them meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from gym_queue.coordinator.aggregator import Aggregator
from gym_queue.coordinator.archive import Archive
from gym_queue.coordinator.delivery import Delivery
from gym_queue.coordinator.groups import Groups
from gym_queue.coordinator.metrics import Metrics
from gym_queue.coordinator.progress import ProgressFile
from gym_queue.ledger.memory import MemoryLedger
from tests.unit.road import run_spec
from tests.unit.small_stack import Examples

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from gym_queue.ledger.base import Event
    from gym_queue.records import GroupPolicy, RunState

SAMPLES = 3


class Stream(MemoryLedger):
    """A results stream that holds ``ended`` rollouts, in this order, and gives them out in batches."""

    def __init__(self, ended: Sequence[Event] = (), batch: int = 1000) -> None:
        super().__init__()
        self.batch = batch
        self.unread: list[Event] = []
        self.bring(*ended)

    def bring(self, *events: Event) -> None:
        """Let rollouts end."""
        known = len(self.unread)
        self.unread += [
            event.model_copy(update={"position": str(known + number)}) for number, event in enumerate(events)
        ]

    async def events(self, run_id: str, after: str, limit: int, wait: float) -> list[Event]:
        return self.unread[: self.batch]

    async def acknowledge(self, run_id: str, position: str) -> int:
        count = [event.position for event in self.unread].index(position) + 1
        del self.unread[:count]
        return count


class Writer:
    """One life of a coordinator, as far as it writes, in the order of the real one."""

    def __init__(self, out: Path, stream: Stream, policy: GroupPolicy, **spec: Any) -> None:
        self.out = out
        self.stream = stream
        self.spec = run_spec(samples=SAMPLES, groups=policy, **spec)

    async def __aenter__(self) -> Self:
        metrics = Metrics(SAMPLES)
        self._archive = Archive(self.out, SAMPLES).open(resume=True, on_row=metrics.add)
        try:
            self._groups = Groups(self.spec, self._archive.paths.run_dir).open(self._archive)
        except BaseException:
            self._archive.close()
            raise
        self.delivery = Delivery(
            ledger=self.stream,
            spec=self.spec,
            source=Examples(100),
            archive=self._archive,
            metrics=metrics,
            groups=self._groups,
            progress=ProgressFile(self._archive.paths.run_dir),
            cancel_samples=_nobody,
        )
        self.aggregator = Aggregator(
            ledger=self.stream,
            run_id=self.spec.run_id,
            archive=self._archive,
            metrics=metrics,
            done=lambda: not self.stream.unread,
            restless=lambda: False,
            delivery=self.delivery,
            on_batch=lambda: None,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        """Let go of the files as a kernel does it: nothing is written any more."""
        self._groups.close()
        self._archive.close()

    async def begin(self) -> None:
        """Say what is durable, as each coordinator does first."""
        await self.delivery.begin()
        await self.aggregator.store(())

    async def write(self, *events: Event) -> None:
        """Write some ended rollouts."""
        self.stream.bring(*events)
        await self.aggregator.step(0.0)

    async def finish(self, state: RunState) -> None:
        """Say how the run ended."""
        self.delivery.final = state
        await self.aggregator.store(())


async def _nobody(_: Mapping[int, str]) -> None:
    """End nothing: nothing is open."""
