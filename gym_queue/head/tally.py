"""Metrics of runs that go on, read from their files: each call reads what came since the last one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from gym_queue.coordinator.archive import paths
from gym_queue.coordinator.metrics import Metrics
from gym_queue.coordinator.rows import read_summary
from gym_queue.durable import storage_errors

if TYPE_CHECKING:
    from pathlib import Path

    from gym_queue.coordinator.metrics import RunMetrics
    from gym_queue.coordinator.progress import Written
    from gym_queue.records import RunStatus

_MOST_RUNS = 32


class Tally:
    """Metrics of one run so far."""

    def __init__(self, out: Path, samples: int) -> None:
        self._paths = paths(out)
        self._metrics = Metrics(samples)
        self._read = [0, 0]
        self._one_at_a_time = threading.Lock()

    def until(self, written: Written, accepted: int | None) -> RunMetrics:
        """Return the metrics of all rows that are durable. For a thread; raises ``StorageError``."""
        with self._one_at_a_time:
            for which, end in enumerate((written.rows, written.failures)):
                self._add(which, end)
            return self._metrics.snapshot(accepted)

    def _add(self, which: int, end: int) -> None:
        path = self._paths.failures if which else self._paths.rows
        if self._read[which] >= end:
            return
        with storage_errors(f"{path} cannot be read"), path.open("rb") as lines:
            lines.seek(self._read[which])
            while self._read[which] < end:
                line = lines.readline()
                self._metrics.add(read_summary(line))
                self._read[which] += len(line)


class Tallies:
    """The tallies of the runs that were asked for last."""

    def __init__(self) -> None:
        self._tallies: OrderedDict[str, Tally] = OrderedDict()

    def of(self, run_id: str, out: Path, samples: int) -> Tally:
        """Return the tally of a run."""
        tally = self._tallies.pop(run_id, None) or Tally(out, samples)
        self._tallies[run_id] = tally
        if len(self._tallies) > _MOST_RUNS:
            self._tallies.popitem(last=False)
        return tally
