"""The decided groups of a run (``OUT.run/groups.jsonl``): a line each, in the order in which they were
decided.

``append`` returns when the lines are on disk. A crash leaves at most one torn last line, which the next
``open`` cuts off. Only whoever holds the archive's lock may open a log; all methods block.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

from pydantic import ConfigDict, ValidationError

from gym_queue.api import GroupOutcome
from gym_queue.coordinator.archive import Place
from gym_queue.coordinator.rows import is_broken_json, reason
from gym_queue.durable import refusal, replacement, storage_errors, sync_directory, write_all
from gym_queue.errors import UsageError
from gym_queue.records import Record

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

NAME = "groups.jsonl"

_FIRST_VERSION = "first_version"


class GroupLine(Record):
    """One decided group. ``rows`` says where the rows of a complete one lie; others have none.

    ``weight_version`` is the oldest that sampled a token of it, ``None`` where nobody knows.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    run_id: str
    example_id: str
    example_index: int
    outcome: GroupOutcome
    weight_version: int | None = None
    rows: tuple[Place, ...] = ()


class GroupLog:
    """See the module's docstring.

    Attributes:
        length: bytes that are on disk.
        notes: sentences for the user about what ``open`` repaired.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / NAME
        self.length = 0
        self.notes: list[str] = []
        self._descriptor: int | None = None
        self._torn = False

    def open(self, on_group: Callable[[GroupLine], None]) -> Self:
        """Create the log, or read what is there and repair a torn end. ``on_group`` is given each line.

        Raises:
            UsageError: a line cannot be read.
            StorageError: the file cannot be created, read or repaired.
        """
        with storage_errors(f"{self.path} cannot be opened"):
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._descriptor = os.open(self.path, flags, 0o666)
            try:
                sync_directory(self.path.parent)
                self._read(self._descriptor, on_group)
            except BaseException:
                self.close()
                raise
        return self

    def close(self) -> None:
        """Close the file. Safe to repeat."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def append(self, lines: Sequence[GroupLine]) -> None:
        """Write some groups; they are on disk when this returns.

        Raises:
            StorageError: nothing of it was kept. The same call may be tried again (``DiskFullError``: once
                there is room).
        """
        if self._descriptor is None:
            msg = f"{self.path} is not open"
            raise ValueError(msg)
        data = b"".join(line.model_dump_json().encode() + b"\n" for line in lines)
        try:
            self._restore(self._descriptor)
            self._torn = True
            write_all(self._descriptor, data)
            os.fdatasync(self._descriptor)
        except OSError as error:
            msg = f"{self.path} cannot be written: {error.strerror}"
            try:
                self._restore(self._descriptor)
            except OSError as second:  # the next append tries again, and so does the next open
                msg += f" (and its torn end cannot be cut off: {second.strerror})"
            raise refusal(msg, error) from error
        self.length += len(data)
        self._torn = False

    def _restore(self, descriptor: int) -> None:
        """Cut off what a failed or interrupted append left."""
        if self._torn:
            os.ftruncate(descriptor, self.length)
            self._torn = False

    def _read(self, descriptor: int, on_group: Callable[[GroupLine], None]) -> None:
        torn = ""
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if torn:
                    raise UsageError(torn)
                try:
                    group = GroupLine.model_validate_json(line)
                except ValidationError as error:
                    torn = f"{self.path} line {number} is not a group of this run: {reason(error)}"
                    if line.endswith(b"\n") and not is_broken_json(error):
                        raise UsageError(torn) from error
                    continue
                if not line.endswith(b"\n"):
                    torn = f"{self.path} line {number} has no end"
                    continue
                on_group(group)
                self.length += len(line)
        if torn:
            os.ftruncate(descriptor, self.length)
            self.notes.append(f"{self.path} ended in a torn line; it is cut off and its group decided again")
        os.fsync(descriptor)  # whoever wrote these lines may have died before its own sync


def first_version(run_dir: Path, now: int) -> int:
    """Return the version of the weights that a run began with: what was noted, else ``now``, which is noted
    durably.

    Raises:
        StorageError: it cannot be read or noted.
        UsageError: what is there is no version.
    """
    path = run_dir / _FIRST_VERSION
    with storage_errors(f"{path} cannot be used"):
        try:
            noted = path.read_text()
        except FileNotFoundError:
            with replacement(path) as file:
                file.write(f"{now}\n".encode())
            return now
    try:
        return int(noted)
    except ValueError as error:
        msg = f"{path} is damaged: it should hold the number of a version"
        raise UsageError(msg) from error
