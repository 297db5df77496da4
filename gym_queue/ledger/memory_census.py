"""What the ledger in memory counts over all runs, and how it probes workers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from gym_queue.census import FAILURE, LASTING, Census, Line, totals_of
from gym_queue.ledger.base import SERVER
from gym_queue.records import Stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from gym_queue.records import RunStatus, Summary, Ticket


class MemoryCensus:
    """The counting part of ``gym_queue.ledger.memory.MemoryLedger``."""

    _clock: Callable[[], float]
    _runs: dict[str, Any]
    _waiting: dict[Ticket, float]
    _delayed: dict[Ticket, float]
    _leases: dict[str, tuple[float, dict[str, str]]]

    def __init__(self) -> None:
        self._gone: Counter[str] = Counter()
        self._ends: dict[str, Counter[str]] = {}
        self._asked: dict[str, float] = {}
        self._round_trips: dict[str, float] = {}

    def _count_end(self, run_id: str, summary: Summary) -> None:
        """Count what a run's status does not."""
        ends = self._ends.setdefault(run_id, Counter())
        ends["prompt_tokens"] += summary.usage.prompt_tokens
        ends["completion_tokens"] += summary.usage.completion_tokens
        if summary.failure_class:
            ends[f"{FAILURE}{summary.failure_class}"] += 1

    def _counters(self, status: RunStatus) -> Counter[str]:
        counters = {name: getattr(status, name) for name in LASTING if name in type(status).model_fields}
        return Counter(counters) + self._ends.get(status.spec.run_id, Counter())

    def _count_gone(self, status: RunStatus) -> None:
        """Keep the counters of a run that is forgotten."""
        self._gone += self._counters(status)
        self._ends.pop(status.spec.run_id, None)

    async def census(self) -> Census:
        """See ``Ledger.census``."""
        there: list[RunStatus] = [run.status for run in self._runs.values()]
        now = self._clock()
        lines = {}
        for stage in Stage:
            since = [at for ticket, at in self._waiting.items() if ticket.stage is stage]
            lines[stage] = Line(tickets=len(since), oldest=max(0.0, now - min(since, default=now)))
        return Census(
            totals=totals_of(sum(map(self._counters, there), self._gone)),
            runs=Counter(status.state for status in there),
            queued=sum(status.queued for status in there),
            in_flight=sum(status.in_flight for status in there),
            unarchived=sum(status.ended - status.archived for status in there),
            delayed=len(self._delayed),
            waiting=lines,
        )

    async def probe(self) -> int:
        """See ``Ledger.probe``."""
        kinds = {worker: info.get("kind", SERVER) for worker, (_, info) in self._leases.items()}
        silent = {worker for worker, kind in kinds.items() if kind != SERVER and worker not in self._asked}
        asked = dict.fromkeys(silent, self._clock())
        self._asked |= asked
        return len(asked)

    async def answer_probe(self, worker: str) -> bool:
        """See ``Ledger.answer_probe``."""
        at = self._asked.pop(worker, None)
        if at is not None:
            self._round_trips[worker] = self._clock() - at
        return at is not None

    def _round_trip(self, worker: str) -> float | None:
        known = [self._round_trips[worker]] if worker in self._round_trips else []
        asked = [self._clock() - self._asked[worker]] if worker in self._asked else []
        return max(known + asked, default=None)

    def _forget_probes(self, worker: str) -> None:
        self._asked.pop(worker, None)
        self._round_trips.pop(worker, None)
