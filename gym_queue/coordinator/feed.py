"""What a run has written so far, to be read while it goes on: ended rollouts and decided groups, from a
cursor.

A cursor is a place in the run's files: bytes of rows and of failures (``R-F``) for rollouts, bytes of the log
for groups. The files only grow, and nobody reads further than the progress file says is durable. So it does
not matter who reads, on which machine, or how often the coordinator died meanwhile: behind a cursor is always
the same.
"""

from __future__ import annotations

import asyncio
import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, Self

from gym_queue.api import GroupRow
from gym_queue.coordinator import progress
from gym_queue.coordinator.archive import paths
from gym_queue.coordinator.group_log import NAME, GroupLine
from gym_queue.durable import storage_errors
from gym_queue.errors import StorageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import BinaryIO

    from gym_queue.coordinator.archive import Place
    from gym_queue.coordinator.progress import Written
    from gym_queue.records import RunState

LARGEST_PAGE = 8 * 2**20

_MOST_LINES = 10_000
"""Groups looked at for one page: all of them may have been dropped."""

_POLL_INTERVAL = 0.025
_BUFFER = 2**18

_ROLLOUTS_CURSOR = re.compile(r"(\d{1,18})-(\d{1,18})", re.ASCII)
_GROUPS_CURSOR = re.compile(r"\d{1,18}", re.ASCII)


class Item(NamedTuple):
    """One rollout or group as JSON, and the cursor behind it."""

    cursor: str
    data: bytes


class Page(NamedTuple):
    """Some items and the cursor behind all that was looked at (which may be more than the items).

    ``ended`` is how the run ended, once it has and there is nothing behind ``cursor``.
    """

    items: list[Item]
    cursor: str
    ended: RunState | None


class Feed:
    """Reads one run. The blocking methods are for a thread.

    Args:
        out: the run's rows, as for ``Archive``. They need not be there yet.
        page_bytes: after so many a page ends, whatever its limit is: it is all in memory.
    """

    def __init__(self, out: Path, page_bytes: int | None = None) -> None:
        self._paths = paths(out)
        self._page_bytes = page_bytes
        self._log = self._paths.run_dir / NAME
        self._progress = self._paths.run_dir / progress.NAME
        self._stamp: object = None
        self._seen: Written | None = None

    def written(self) -> Written:
        """Return how far the run is. Raises ``StorageError``."""
        return progress.read(self._paths.run_dir)

    def rollouts(self, cursor: str = "", limit: int = 1000) -> Page:
        """Return the rows of up to ``limit`` ended rollouts behind a cursor (``""``: from the first one).

        Each is a line of the output, byte by byte. Blocks.

        Raises:
            UsageError: no such cursor can have come from this run.
            StorageError: a file cannot be read.
        """
        written = self.written()  # first: what it counts is there
        rows, failures = _parse_rollouts(cursor)
        _check(self._paths.rows, rows)
        _check(self._paths.failures, failures)
        items: list[Item] = []
        room = self._page_bytes or LARGEST_PAGE
        # Rows that succeeded leave some room to the others, lest a slow reader meet those last of all.
        for most in (limit - limit // 2, limit):
            for behind, line in _lines(self._paths.rows, rows, written.rows, most - len(items), room):
                rows, room = behind, room - len(line)
                items.append(Item(f"{rows}-{failures}", line))
            rest = limit - len(items)
            for behind, line in _lines(self._paths.failures, failures, written.failures, rest, room):
                failures, room = behind, room - len(line)
                items.append(Item(f"{rows}-{failures}", line))
        read = rows >= written.rows and failures >= written.failures
        return Page(items, f"{rows}-{failures}", written.state if written.final and read else None)

    def groups(self, cursor: str = "", limit: int = 100, *, dropped: bool = False) -> Page:
        """Return up to ``limit`` decided groups behind a cursor (``""``: from the first one), as JSON of
        ``GroupRow``: complete ones with their rows, and if ``dropped`` the others without. Blocks.

        Raises:
            UsageError: no such cursor can have come from this run.
            StorageError: a file cannot be read.
        """
        written = self.written()
        place = _parse_groups(cursor)
        _check(self._log, place)
        items: list[Item] = []
        room = self._page_bytes or LARGEST_PAGE
        with _Rows(self._paths.rows, self._paths.failures) as rows:
            for behind, line in _lines(self._log, place, written.groups, _MOST_LINES, LARGEST_PAGE):
                place = behind
                group = GroupLine.model_validate_json(line)
                if group.outcome == "complete" or dropped:
                    data = rows.of(group)
                    room -= len(data)
                    items.append(Item(str(place), data))
                if room <= 0 or len(items) >= limit:
                    break
        ended = written.state if written.final and place >= written.groups else None
        return Page(items, str(place), ended)

    async def wait_for_rollouts(self, cursor: str, timeout: float) -> bool:  # noqa: ASYNC109 - it polls
        """Return true as soon as there is something behind a cursor or the run has ended, false after
        ``timeout`` seconds.

        Raises:
            UsageError: this is no cursor.
            StorageError: the progress file cannot be read.
        """
        rows, failures = _parse_rollouts(cursor)
        return await self._wait(lambda seen: seen.rows > rows or seen.failures > failures, timeout)

    async def wait_for_groups(self, cursor: str, timeout: float) -> bool:  # noqa: ASYNC109 - the same
        """Like ``wait_for_rollouts``, for groups. Those that there are may all have been dropped."""
        place = _parse_groups(cursor)
        return await self._wait(lambda seen: seen.groups > place, timeout)

    async def _wait(self, there_is_more: Callable[[Written], bool], seconds: float) -> bool:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            seen = self._look()
            if seen.final or there_is_more(seen):
                return True
            left = deadline - loop.time()
            if left <= 0:
                return False
            await asyncio.sleep(min(_POLL_INTERVAL, left))

    def _look(self) -> Written:
        """Return how far the run is; cheap, as the file is read only when it was replaced."""
        try:
            status = self._progress.stat()
            stamp: object = status.st_ino, status.st_mtime_ns, status.st_size
        except FileNotFoundError:
            stamp = None
        if self._seen is None or stamp != self._stamp:
            self._seen = self.written()
            self._stamp = stamp
        return self._seen


class _Rows:
    """Rows of both files, read from where the log says that they lie."""

    def __init__(self, *files: Path) -> None:
        self._paths = files
        self._open: list[BinaryIO] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open:
            file.close()

    def of(self, group: GroupLine) -> bytes:
        """Return a group as JSON of ``GroupRow``, its rows as they stand in the file."""
        if group.rows and not self._open:
            with storage_errors(f"{self._paths[0]} cannot be read"):
                for path in self._paths:
                    self._open.append(path.open("rb"))
        fields = group.model_dump(exclude={"rows"})
        head = GroupRow(**fields).model_dump_json(exclude={"rollouts"}).encode()
        return b'%s,"rollouts":[%s]}' % (head.removesuffix(b"}"), b",".join(map(self._read, group.rows)))

    def _read(self, place: Place) -> bytes:
        path = self._paths[place.which]
        with storage_errors(f"{path} cannot be read"):
            row = os.pread(self._open[place.which].fileno(), place.length, place.offset)
        if len(row) < place.length:
            msg = f"{path} is shorter than it was: a row at byte {place.offset} is missing"
            raise StorageError(msg)
        return row


def _lines(path: Path, start: int, end: int, limit: int, room: int) -> Iterator[tuple[int, bytes]]:
    """Yield lines between two places and the place behind each: up to ``limit``, and up to the one with which
    they are ``room`` bytes.
    """
    if start >= end or limit <= 0 or room <= 0:
        return
    with storage_errors(f"{path} cannot be read"), path.open("rb", buffering=_BUFFER) as file:
        file.seek(start)
        while start < end and limit > 0 and room > 0:
            line = file.readline()
            start += len(line)
            limit -= 1
            room -= len(line)
            yield start, line.removesuffix(b"\n")


def _check(path: Path, place: int) -> None:
    """Raise ``UsageError`` for a place in a file that is not behind a line of it."""
    if place == 0:
        return
    last = b""
    with storage_errors(f"{path} cannot be read"), suppress(FileNotFoundError), path.open("rb") as file:
        if place <= os.fstat(file.fileno()).st_size:  # a file system refuses a place that no file can have
            file.seek(place - 1)
            last = file.read(1)
    if last != b"\n":
        where = "behind the end of" if not last else "within a line of"
        msg = f"this is no cursor of this run: {place} is {where} {path.name}"
        raise UsageError(msg)


def _parse_rollouts(cursor: str) -> tuple[int, int]:
    if not cursor:
        return 0, 0
    if not (found := _ROLLOUTS_CURSOR.fullmatch(cursor)):
        msg = f"{cursor[:40]!r} is no cursor of rollouts, which are two numbers: R-F"
        raise UsageError(msg)
    return int(found[1]), int(found[2])


def _parse_groups(cursor: str) -> int:
    if cursor and not _GROUPS_CURSOR.fullmatch(cursor):
        msg = f"{cursor[:40]!r} is no cursor of groups, which is a number"
        raise UsageError(msg)
    return int(cursor or 0)
