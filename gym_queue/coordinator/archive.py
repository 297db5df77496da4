"""The archive: the two files in which every ended rollout appears exactly once, durably.

``append`` returns when the rows are on disk, so its caller may acknowledge them. A crash at any point leaves
at most one torn last line per file, which the next ``open(resume=True)`` cuts off; rows that come again are
recognised by their place in the run (ordinal = example_index * samples + sample_index) and not written twice.

Memory: 8 bytes a rollout, which say where its row begins; they are also the record of what is done. All
methods block, and one thread at a time may use an archive.
"""

from __future__ import annotations

import errno
import fcntl
import heapq
import os
from array import array
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple, Self

from gym_queue.coordinator.rows import is_broken_json, read_summary, reason, withdraw
from gym_queue.durable import (
    refusal,
    replacement,
    storage_errors,
    sync_directory,
    temporary_of,
    write_all,
)
from gym_queue.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from pathlib import Path

    from gym_queue.ledger.base import Event
    from gym_queue.records import Summary

_LOCK = "lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class OutputPaths(NamedTuple):
    """Where a run's output lives; all derived from what ``-o`` names."""

    rows: Path
    failures: Path
    metrics: Path
    run_dir: Path


def paths(out: Path) -> OutputPaths:
    """Derive all output paths from ``-o OUT.jsonl``."""
    stem = out.name.removesuffix(".jsonl") or out.name
    if not stem:
        msg = f"{out} is not a file name"
        raise UsageError(msg)
    return OutputPaths(
        rows=out,
        failures=out.with_name(f"{stem}.failures.jsonl"),
        metrics=out.with_name(f"{stem}.metrics.json"),
        run_dir=out.with_name(f"{stem}.run"),
    )


def is_being_written(run_dir: Path) -> bool | None:
    """Tell whether a process has a run's archive open; ``None`` where that cannot be seen from here."""
    try:
        lock = os.open(run_dir / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    else:
        return False
    finally:
        os.close(lock)


class Place(NamedTuple):
    """Where a row lies: in which file (0: succeeded, 1: others), from which byte, how many without the end of
    its line.
    """

    which: int
    offset: int
    length: int


@dataclass(slots=True)
class _File:
    """One of the two files: ``length`` bytes and ``rows`` lines of it are known to be whole and on disk."""

    path: Path
    descriptor: int
    length: int = 0
    rows: int = 0


class Archive:
    """The output of one run of ``samples`` samples an example. See the module's docstring.

    Attributes:
        count: rollouts in the files.
        duplicates: events that ``append`` was given and had already.
        notes: sentences for the user about what ``open`` found and repaired.
    """

    def __init__(self, out: Path, samples: int) -> None:
        self.paths = paths(out)
        self.samples = samples
        self.count = 0
        self.duplicates = 0
        self.notes: list[str] = []
        self._places = array("Q")  # by ordinal: 0 = not done, else 1 + (offset of the row * 2 + which file)
        self._files: list[_File] = []
        self._lock: int | None = None
        self._torn = False

    def open(
        self,
        *,
        resume: bool = False,
        retry: Collection[str] = (),
        on_row: Callable[[Summary], None] | None = None,
    ) -> Self:
        """Create the files, or with ``resume`` read what is there, repair a torn end, and continue.

        Args:
            resume: continue existing output (none is fine too).
            retry: rows of these failure classes are taken out, and so count as not done (``rows.withdraw``).
            on_row: is given the summary of each row that is kept, in about the order of the input.

        Raises:
            UsageError: output exists and ``resume`` is false, another process is writing it, or a row cannot
                be read.
            StorageError: the files cannot be created, read or repaired.
        """
        try:
            with storage_errors(f"{self.paths.rows} cannot be opened"):
                self._refuse_existing(resume=resume)
                self.paths.run_dir.mkdir(parents=True, exist_ok=True)
                self._take_lock()
                self._refuse_existing(
                    resume=resume
                )  # again: another process may have written and left meanwhile
                for path in (self.paths.rows, self.paths.failures):
                    temporary_of(path).unlink(missing_ok=True)
                self._withdraw(retry)
                for path in (self.paths.rows, self.paths.failures):
                    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                    self._files.append(_File(path, os.open(path, flags, 0o666)))
                sync_directory(self.paths.rows.parent)
                self._read_existing(on_row)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Close the files and let other processes have them. Safe to repeat."""
        for file in self._files:
            os.close(file.descriptor)
        self._files = []
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def is_done(self, ordinal: int) -> bool:
        """Tell whether the files hold this rollout."""
        return ordinal < len(self._places) and self._places[ordinal] != 0

    def done_samples(self, example_index: int) -> list[int]:
        """Return the sample indices of an example that the files hold, in order."""
        first = example_index * self.samples
        return [sample for sample in range(self.samples) if self.is_done(first + sample)]

    @property
    def examples(self) -> int:
        """One more than the highest index of an example of which the files hold a sample."""
        return -(-len(self._places) // self.samples)

    @property
    def lengths(self) -> tuple[int, int]:
        """Bytes of the two files that are on disk: rows of succeeded rollouts, and of others."""
        return self._files[0].length, self._files[1].length

    def place(self, example_index: int, sample_index: int) -> tuple[int, int]:
        """Return in which file a row lies, and from which byte. The files must hold it."""
        which_and_offset = self._places[example_index * self.samples + sample_index] - 1
        return which_and_offset & 1, which_and_offset >> 1

    def read(self, example_index: int, sample_index: int) -> tuple[Place, bytes]:
        """Read a row, without the end of its line. The files must hold it. Raises ``StorageError``."""
        which, offset = self.place(example_index, sample_index)
        path = self._files[which].path
        with storage_errors(f"{path} cannot be read"), path.open("rb") as rows:
            rows.seek(offset)
            row = rows.readline().removesuffix(b"\n")
        return Place(which, offset, len(row)), row

    def append(self, events: Sequence[Event]) -> list[Event]:
        """Write the rows of events that are not in the files yet; they are on disk when this returns.

        Returns:
            The events that were new, in the order given; those seen before are counted in ``duplicates``.

        Raises:
            StorageError: nothing of the batch was kept. The same call may be tried again (``DiskFullError``:
                once there is room).
        """
        fresh: dict[int, Event] = {}
        for event in events:
            ordinal = self._ordinal(event.summary)
            if not self.is_done(ordinal):
                fresh.setdefault(ordinal, event)
        if fresh:
            self._write(fresh)
        self.duplicates += len(events) - len(fresh)
        return list(fresh.values())

    def finalize(self) -> None:
        """Put both files into the order of the input (example, then sample), and close the archive.

        Raises:
            StorageError: there is no room for the sorted copy. The file that was there stays, complete and in
                order of arrival.
        """
        try:
            with storage_errors(f"{self.paths.rows} cannot be completed"):
                self._restore()
            for which, file in enumerate(self._files):
                self._sort(which, file)
        finally:
            self.close()

    def _refuse_existing(self, *, resume: bool) -> None:
        for path in (self.paths.rows, self.paths.failures):
            if not resume and path.exists() and path.stat().st_size:
                msg = f"{path} exists already; continue it with --resume or choose another output file"
                raise UsageError(msg)

    def _take_lock(self) -> None:
        """Keep other processes out, which would write the same rollouts. A lock dies with its process."""
        self._lock = os.open(self.paths.run_dir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            msg = f"another process is writing {self.paths.rows}; wait for it or stop it first"
            raise UsageError(msg) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:  # some cluster file systems have none; then go without
                raise

    def _withdraw(self, classes: Collection[str]) -> None:
        if not classes or not self.paths.failures.exists():
            return
        if withdrawn := withdraw(self.paths.failures, classes):
            counts = ", ".join(f"{count} {name}" for name, count in sorted(withdrawn.items()))
            self.notes.append(
                f"{withdrawn.total()} rollouts of {self.paths.failures} are done again: {counts}"
            )

    def _ordinal(self, summary: Summary) -> int:
        if summary.sample_index >= self.samples:
            msg = f"example {summary.example_index} has {self.samples} samples, no {summary.sample_index}"
            raise ValueError(msg)
        return summary.example_index * self.samples + summary.sample_index

    def _mark(self, ordinal: int, which: int, offset: int) -> None:
        missing = ordinal + 1 - len(self._places)
        if missing > 0:
            self._places.frombytes(bytes(missing * self._places.itemsize))
        self._places[ordinal] = 1 + offset * 2 + which
        self.count += 1

    def _read_existing(self, on_row: Callable[[Summary], None] | None) -> None:
        """Record what the files hold.

        Both files are nearly in order, so merging them lets the samples of one example come close together,
        and whoever sums up by example needs to remember few examples at a time.
        """
        repeated = 0
        for ordinal, which, offset, summary in heapq.merge(self._scan(0), self._scan(1), key=itemgetter(0)):
            if self.is_done(ordinal):
                repeated += 1
                continue
            self._mark(ordinal, which, offset)
            if on_row is not None:
                on_row(summary)
        if repeated:
            self.notes.append(
                f"{self.paths.rows} and {self.paths.failures.name} have {repeated} rows of rollouts they "
                "hold already; the first row of each counts, the others go when the run ends"
            )

    def _scan(self, which: int) -> Iterator[tuple[int, int, int, Summary]]:
        """Yield (ordinal, which, offset, summary) of each row, then cut off a torn last line."""
        file = self._files[which]
        torn = ""
        with file.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if torn:
                    raise UsageError(torn)
                whole = line.endswith(b"\n")
                try:
                    summary = read_summary(line)
                    ordinal = self._ordinal(summary)
                except ValueError as error:
                    torn = f"{file.path} line {number} is not a rollout of this run: {reason(error)}"
                    if whole and not is_broken_json(error):
                        raise UsageError(torn) from error
                    continue
                if not whole:
                    torn = f"{file.path} line {number} has no end"
                    continue
                yield ordinal, which, file.length, summary
                file.length += len(line)
                file.rows += 1
        if torn:
            os.ftruncate(file.descriptor, file.length)
            self.notes.append(f"{file.path} ended in a torn line; it is cut off and its rollout done again")
        os.fsync(file.descriptor)  # whoever wrote these rows may have died before its own fsync

    def _write(self, fresh: dict[int, Event]) -> None:
        """Write, sync and mark the new rows, or leave everything as it was."""
        batches: tuple[list[bytes], list[bytes]] = ([], [])
        ends = [file.length for file in self._files]
        places: list[tuple[int, int, int]] = []
        for ordinal, event in fresh.items():
            if b"\n" in event.row:
                msg = f"the row of rollout {ordinal} has a line break"
                raise ValueError(msg)
            which = int(event.summary.state != "succeeded")
            places.append((ordinal, which, ends[which]))
            ends[which] += len(event.row) + 1
            batches[which].append(event.row)
        writing = self.paths.rows
        try:
            self._restore()
            self._torn = True
            touched = [(file, batch) for file, batch in zip(self._files, batches, strict=True) if batch]
            for file, batch in touched:
                writing = file.path
                write_all(file.descriptor, b"\n".join([*batch, b""]))
            for file, _ in touched:
                writing = file.path
                os.fdatasync(file.descriptor)
        except OSError as error:
            msg = f"{writing} cannot be written: {error.strerror}"
            try:
                self._restore()
            except OSError as second:  # the next append tries again, and so does --resume
                msg += f" (and its torn end cannot be cut off: {second.strerror})"
            raise refusal(msg, error) from error
        for file, batch, end in zip(self._files, batches, ends, strict=True):
            file.length = end
            file.rows += len(batch)
        self._torn = False
        for ordinal, which, offset in places:
            self._mark(ordinal, which, offset)

    def _restore(self) -> None:
        """Cut off what a failed or interrupted append left."""
        if self._torn:
            for file in self._files:
                os.ftruncate(file.descriptor, file.length)
            self._torn = False

    def _offsets(self, which: int) -> Iterator[int]:
        """Yield where the rows of one file begin, in the order of the input."""
        return (place - 1 >> 1 for place in self._places if place and (place - 1) & 1 == which)

    def _sort(self, which: int, file: _File) -> None:
        kept = sum(1 for _ in self._offsets(which))
        if kept == file.rows and all(one < two for one, two in pairwise(self._offsets(which))):
            return
        sentence = (
            f"{file.path} stays complete, but in order of arrival, because the sorted copy cannot be written"
        )
        with storage_errors(sentence), file.path.open("rb") as rows, replacement(file.path) as ordered:
            for offset in self._offsets(which):
                rows.seek(offset)
                ordered.write(rows.readline())
