"""The appended input of a run: ``examples.jsonl``, written by any head, read by the one that leads.

Blank lines are not kept, so line N of the file is example N - 1. How much of the file counts is said by
``examples.index`` (``inbox_index``). All functions block.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from bisect import bisect_right
from contextlib import contextmanager
from itertools import islice
from operator import itemgetter
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO

from gym_queue.coordinator import inbox_index
from gym_queue.coordinator.example_rows import id_of, parse
from gym_queue.coordinator.inbox_index import RECORD_BYTES, Standing
from gym_queue.durable import storage_errors, sync_directory
from gym_queue.errors import ConflictError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from gym_queue.coordinator.example_rows import ExampleRows
    from gym_queue.records import Example

_ROWS = "examples.jsonl"
_INDEX = "examples.index"

_MOST_BITS = 1 << 26
_LEAST_BITS = 1 << 16
_BITS_AN_ID = 64
_PLACES_AN_ID = 4
_HEADROOM = 8

_STRIDE = 1000
"""Rows between two marks of where a row begins."""

_Line = tuple[int, bytes, dict[str, Any]]
"""A row of a body: its line there, its bytes, what they say."""


def standing(folder: Path) -> Standing:
    """Return how far the input in a run's folder has come: a few bytes are read. Raises ``StorageError``."""
    with storage_errors(f"{folder / _INDEX} cannot be read"):
        return inbox_index.read(folder / _INDEX)


class Inbox:
    """Appends to the input of one run. Any number of processes may; threads may share an object.

    The ids of a run are unique: that is exact, over all appends of all processes. Each object remembers in at
    most 8 MiB where ids may be taken (a Bloom filter: Bloom 1970, "Space/Time Trade-offs in Hash Coding with
    Allowable Errors", of four places an id), reads what others appended when it meets it first, and reads the
    file again only as the filter grows, and for an id that may be a repeated one. Wrongly that happens for
    one id in 80,000 in a run of up to a million examples, and for one in 25 in a run of ten million: then
    appending gets slow, not wrong.

    Args:
        folder: the run's; it is there.
        rows: makes examples of rows, and refuses those that cannot be used.
    """

    def __init__(self, folder: Path, rows: ExampleRows) -> None:
        self._path = folder / _ROWS
        self._index_path = folder / _INDEX
        self._rows = rows
        self._ids = _Ids(0)
        self._seen = Standing()
        self._one_at_a_time = Lock()  # a caller may be gone while its thread still works

    def append(self, body: bytes, offset: int | None, *, refusal: str = "") -> int:
        """Append the rows of ``body``, one JSON object a line: all of them or none. They are on disk when
        this returns.

        Args:
            body: the lines, UTF-8. Blank ones do not count.
            offset: index of the first of these rows in the run. Those that are there already, byte for byte,
                are not taken again: a call that is repeated appends once. ``None``: behind what is there.
            refusal: why no new rows are taken; empty: they are, unless the input is closed.

        Returns:
            How many examples the run has.

        Raises:
            UsageError: a row cannot be used; the sentence begins with its line in ``body``.
            ConflictError: ``offset`` leaves a gap, other rows stand there, or the run is closed.
            StorageError: the files cannot be read or written; nothing was taken.
        """
        lines = _lines(body)
        with self._one_at_a_time:
            return self._append(lines, offset, refusal)

    def close(self) -> int:
        """Let no more rows come, durably. Returns how many examples there are. Safe to repeat.

        Raises:
            StorageError: it cannot be written.
        """
        with storage_errors(f"{self._index_path} cannot be written"), self._locked() as (data, index):
            before = self._repaired(data, index)
            if not before.closed:
                self._say(index, before._replace(closed=True))
            os.fdatasync(index)
        return before.rows

    def _append(self, lines: list[_Line], offset: int | None, refusal: str) -> int:
        with storage_errors(f"{self._path} cannot be written"), self._locked() as (data, index):
            before = self._repaired(data, index)
            if offset is not None:
                lines = self._without_known(lines, offset, before)
            if before.closed:
                refusal = f"the run is closed: it has {before.rows} examples and takes no more"
            if lines and refusal:
                raise ConflictError(refusal)
            if not lines:
                os.fdatasync(data)  # whoever wrote what is there already may have died before its own
                os.fdatasync(index)
                return before.rows
            ids = self._check(lines, before)
            content = b"".join(line + b"\n" for _, line, _ in lines)
            _write_all(data, content, before.length)
            os.fdatasync(data)
            after = Standing(before.rows + len(lines), before.length + len(content))
            self._say(index, after)
        self._remember(ids, after)
        return after.rows

    @contextmanager
    def _locked(self) -> Iterator[tuple[int, int]]:
        """Open both files, and keep other writers out, of this process and others."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        index = os.open(self._index_path, flags, 0o666)
        try:
            fcntl.flock(index, fcntl.LOCK_EX)
            data = os.open(self._path, flags, 0o666)
            try:
                yield data, index
            finally:
                os.close(data)
        finally:
            os.close(index)

    def _repaired(self, data: int, index: int) -> Standing:
        """Return how far the input has come, and cut off what a writer left that died."""
        known, end = inbox_index.newest(index)
        if not known.rows:
            sync_directory(self._path.parent)  # the names of the two files
        os.ftruncate(index, end)
        os.ftruncate(data, known.length)
        return known

    def _say(self, index: int, now: Standing) -> None:
        """Make it true: from here on the rows count."""
        _write_all(index, inbox_index.encode(now), os.fstat(index).st_size)
        os.fdatasync(index)

    def _without_known(self, lines: list[_Line], offset: int, before: Standing) -> list[_Line]:
        """Leave out the rows that are there already."""
        if offset > before.rows:
            msg = f"the run has {before.rows} examples: rows from {offset} on would leave a gap"
            raise ConflictError(msg)
        known = min(before.rows - offset, len(lines))
        if known:
            with AppendedRows(self._path, self._index_path).lines(offset, offset + known) as there:
                for place, ((number, line, _), (_, stored)) in enumerate(zip(lines, there, strict=False)):
                    if line != stored:
                        msg = f"line {number}: the run has another example {offset + place} already"
                        raise ConflictError(msg)
        return lines[known:]

    def _check(self, lines: Sequence[_Line], before: Standing) -> list[str]:
        """Return the ids of new rows. Raises ``UsageError`` for one that cannot be used."""
        first: dict[str, int] = {}
        for place, (number, _, row) in enumerate(lines, before.rows + 1):
            with _in_line(number):
                identity = self._rows.example(place, row).id
                if identity in first:
                    msg = f"the id {identity!r} is taken by line {first[identity]}"
                    raise UsageError(msg)
            first[identity] = number
        self._refuse_taken(first, before)
        return list(first)

    def _refuse_taken(self, first: dict[str, int], before: Standing) -> None:
        rows = AppendedRows(self._path, self._index_path)
        if not self._ids.has_room(before.rows + len(first)):
            self._ids, self._seen = _Ids(before.rows + len(first)), Standing()
        if self._seen.rows < before.rows:  # others appended
            with rows.lines(self._seen.rows, before.rows) as lines:
                self._remember((id_of(parse(line), number) for number, line in lines), before)
        suspects = {identity for identity in first if identity in self._ids}
        if not suspects:
            return
        with rows.lines(0, before.rows) as lines:
            for number, line in lines:
                if (identity := id_of(parse(line), number)) in suspects:
                    with _in_line(first[identity]):
                        msg = f"the id {identity!r} is taken by example {number - 1} of the run"
                        raise UsageError(msg)

    def _remember(self, ids: Iterable[str], now: Standing) -> None:
        for identity in ids:
            self._ids.add(identity)
        self._seen = now


class AppendedRows:
    """Reads the lines of an input that may still grow. Threads may share it.

    Finds a line quickly: it knows where every ``_STRIDE``-th or so begins, of those it has seen.
    """

    def __init__(self, path: Path, index_path: Path) -> None:
        self._path = path
        self._index_path = index_path
        self._lock = Lock()
        self._read = 0
        self._marks: list[tuple[int, int]] = [(0, 0)]  # a row, and where it begins; ordered
        self._now = Standing()

    def now(self) -> Standing:
        """Return how far the input has come. Only what is new is looked at, and nothing once it is closed."""
        with self._lock:
            if self._now.closed:
                return self._now
            for standing in inbox_index.records(self._index_path, self._read):
                self._read += RECORD_BYTES
                self._now = standing
                if standing.rows >= self._marks[-1][0] + _STRIDE:
                    self._marks.append((standing.rows, standing.length))
            return self._now

    @contextmanager
    def lines(self, start: int, end: int) -> Iterator[Iterator[tuple[int, bytes]]]:
        """Give number and content of the lines of rows ``start`` .. ``end - 1``, all of which are there."""
        self.now()
        with self._path.open("rb") as file:
            yield self._lines(file, start, end)

    def _lines(self, file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        with self._lock:
            row, place = self._marks[bisect_right(self._marks, start, key=itemgetter(0)) - 1]
        file.seek(place)
        next_mark = row + _STRIDE
        for line in islice(file, end - row):
            if row >= start:
                yield row + 1, line.removesuffix(b"\n")
            row, place = row + 1, place + len(line)
            if row == next_mark:
                next_mark += _STRIDE
                self._mark(row, place)

    def _mark(self, row: int, place: int) -> None:
        with self._lock:
            at = bisect_right(self._marks, row, key=itemgetter(0))
            if row - self._marks[at - 1][0] >= _STRIDE:
                self._marks.insert(at, (row, place))


class AppendedSource:
    """The examples that were appended so far, for the coordinator (``gym_queue.coordinator.source.Source``).

    ``count`` grows until ``closed``; ask for ``closed`` first, then for ``count``, to know the last word.
    """

    fingerprint = ""
    """What will come is not known."""

    def __init__(self, folder: Path, rows: ExampleRows) -> None:
        self._path = folder / _ROWS
        self._rows = rows
        self._lines = AppendedRows(self._path, folder / _INDEX)

    @property
    def count(self) -> int:
        """Number of examples so far. Raises ``StorageError``."""
        return self._now().rows

    @property
    def closed(self) -> bool:
        """Whether no more will come. Raises ``StorageError``."""
        return self._now().closed

    def examples(self, start: int) -> Iterator[Example]:
        """Yield the examples from index ``start`` on that are there now.

        Raises:
            StorageError: the file cannot be read.
            UsageError: an example cannot be used here, though it was checked where it was appended.
        """
        with (
            storage_errors(f"{self._path} cannot be read"),
            self._lines.lines(start, self.count) as lines,
        ):
            for number, line in lines:
                try:
                    yield self._rows.example(number, parse(line))
                except UsageError as error:
                    msg = f"{self._path} line {number}: {error}"
                    raise UsageError(msg) from error

    def _now(self) -> Standing:
        with storage_errors(f"{self._path} cannot be read"):
            return self._lines.now()


class _Ids:
    """Ids that were seen, in the memory that several times ``rows`` of them need, or the most there may be.
    Says of some others, rarely, that it saw them too.
    """

    def __init__(self, rows: int) -> None:
        wanted = 1 << (_BITS_AN_ID * _HEADROOM * rows).bit_length()
        self._size = min(max(wanted, _LEAST_BITS), _MOST_BITS)
        self._bits = bytearray(self._size // 8)

    def has_room(self, rows: int) -> bool:
        """Tell whether so many can be told from others as well as may be."""
        return self._size >= min(_BITS_AN_ID * rows, _MOST_BITS)

    def add(self, identity: str) -> None:
        for place in self._places(identity):
            self._bits[place >> 3] |= 1 << (place & 7)

    def __contains__(self, identity: str) -> bool:
        return all(self._bits[place >> 3] & (1 << (place & 7)) for place in self._places(identity))

    def _places(self, identity: str) -> Iterator[int]:
        digest = hashlib.blake2b(identity.encode(), digest_size=4 * _PLACES_AN_ID).digest()
        for start in range(0, len(digest), 4):
            yield int.from_bytes(digest[start : start + 4], "big") & (self._size - 1)


def _lines(body: bytes) -> list[_Line]:
    """Parse the filled lines of a body. Raises ``UsageError`` with the line."""
    found = []
    for number, line in enumerate(body.split(b"\n"), start=1):
        if content := line.strip():
            with _in_line(number):
                found.append((number, content, parse(content)))
    return found


@contextmanager
def _in_line(number: int) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        msg = f"line {number}: {error}"
        raise UsageError(msg) from error


def _write_all(descriptor: int, data: bytes, place: int) -> None:
    """Write all of ``data`` at ``place``; a disk that fills up takes a part first and fails on the rest."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, place)
        rest, place = rest[written:], place + written
