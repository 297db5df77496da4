"""How far a run is, for those who read its files while it goes on (``OUT.run/progress.json``).

The coordinator replaces the file after each batch that is durable, so a reader never sees half of it, and
what it says is there is there. It is not synced each time: the files themselves are the record, and whoever
opens them next says anew how long they are.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pydantic import ConfigDict, ValidationError

from gym_queue.api import GroupCounts
from gym_queue.coordinator.metrics import RolloutCounts
from gym_queue.durable import replacement, storage_errors, temporary_of
from gym_queue.records import Record, RunState

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NAME = "progress.json"

_FINAL = (RunState.CANCELLED, RunState.ENDED)


class Written(Record):
    """What of a run is durable, and how it stands.

    ``rows``, ``failures`` and ``groups`` are bytes of the three files (rows of succeeded rollouts, of others,
    decided groups): readers read no further. ``rollouts`` and ``reward_mean`` are of the rows, ``decided`` of
    the groups; ``examples`` is how many the source had. ``waiting_for`` is a sentence while nothing more can
    be begun. ``state`` is final only when all has been written.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    rows: int = 0
    failures: int = 0
    groups: int = 0
    rollouts: RolloutCounts = RolloutCounts(accepted=None, ended=0, succeeded=0, failed=0, cancelled=0)
    decided: GroupCounts = GroupCounts()
    reward_mean: float | None = None
    state: RunState = RunState.OPEN
    waiting_for: str | None = None
    examples: int = 0

    @property
    def final(self) -> bool:
        """Whether nothing more will be written."""
        return self.state in _FINAL


class ProgressFile:
    """Writes a run's progress file; only whoever holds the archive's lock may. Any thread may write.

    Args:
        run_dir: ``OUT.run``, which must be there when it is written.
        tell: is given what the file says, each time it says something else, for those in this process who
            wait for that. May come from any thread, in order.
    """

    def __init__(self, run_dir: Path, tell: Callable[[Written], None] = lambda _: None) -> None:
        self._path = run_dir / NAME
        self._tell = tell
        self._one_at_a_time = threading.Lock()
        self._last: Written | None = None

    def write(self, look: Callable[[], Written]) -> None:
        """Say how far the run is, unless that was said last. ``look`` is called when no other write is under
        way, so that what is said never goes back. What is final is durable when this returns.

        Raises:
            StorageError: it cannot be written; what was there stays.
        """
        with self._one_at_a_time, storage_errors(f"{self._path} cannot be written"):
            written = look()
            if written == self._last:
                return
            content = written.model_dump_json().encode() + b"\n"
            if written.final:
                with replacement(self._path) as file:
                    file.write(content)
            else:
                temporary = temporary_of(self._path)
                temporary.write_bytes(content)
                temporary.replace(self._path)
            self._last = written
            self._tell(written)


def read(run_dir: Path) -> Written:
    """Return how far a run is; nothing is written yet where there is no such file.

    Raises:
        StorageError: it cannot be read.
    """
    path = run_dir / NAME
    with storage_errors(f"{path} cannot be read"):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return Written()
    try:
        return Written.model_validate_json(content)
    except ValidationError:  # the machine crashed before it was on the disk: until it is said anew
        return Written()
