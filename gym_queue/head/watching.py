"""One look for many: whoever follows a run waits here, and one task looks at the files for all of them.

Runs that this process drives need no look: who writes their progress says so at once (``Watchers.driving``).
The looks are for those that another head drives.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from gym_queue.coordinator import progress
from gym_queue.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from concurrent.futures import Executor
    from pathlib import Path

    from gym_queue.coordinator.progress import Written

_Result = TypeVar("_Result")

INTERVAL = 0.025
"""Seconds between two looks while somebody waits."""

_Stamp = tuple[int, int, int]


class Watch:
    """A run that somebody waits for. ``newest`` is what its progress file said last."""

    def __init__(self, run_dir: Path, readers: Executor) -> None:
        self.users = 0
        self._readers = readers
        self.newest: Written | None = None
        self.run_dir = run_dir
        self._stamp: _Stamp | None = None
        self._news = asyncio.Event()
        self._first = asyncio.Lock()

    async def begin(self) -> None:
        """Look for the first time, once for all who come at the same time. Raises ``StorageError``."""
        async with self._first:
            found = await _in(self._readers, self.look) if self.newest is None else None
            if found is not None and self.newest is None:  # else what was heard meanwhile is newer
                self.tell(found)

    async def beyond(self, known: Written | None, seconds: float) -> None:
        """Return when there is something newer than ``known``, or the time is over, or the head stops."""
        if self.newest == known:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._news.wait()

    def look(self) -> Written | None:
        """Return what is new, if anything. For a thread; raises ``StorageError``."""
        stamp = _stamp_of(self.run_dir / progress.NAME)
        if stamp == self._stamp and self.newest is not None:
            return None
        written = progress.read(self.run_dir)
        self._stamp = stamp
        return written

    def tell(self, written: Written) -> None:
        """Let all who wait know."""
        if written != self.newest:
            self.newest = written
            self.wake()

    def wake(self) -> None:
        """Let all who wait go on."""
        self._news.set()
        self._news = asyncio.Event()


class Watchers:
    """All runs that somebody waits for, in this process.

    Args:
        readers: threads that look at files.

    Attributes:
        looks: rounds of looking so far. ``files``: files looked at. For tests.
    """

    def __init__(self, readers: Executor) -> None:
        self._readers = readers
        self._watches: dict[Path, Watch] = {}
        self._task: asyncio.Task[None] | None = None
        self._driven: set[Path] = set()
        self.looks = 0
        self.files = 0

    @property
    def users(self) -> int:
        """How many wait."""
        return sum(watch.users for watch in self._watches.values())

    @property
    def is_looking(self) -> bool:
        """Whether files are looked at."""
        return self._task is not None and not self._task.done()

    @asynccontextmanager
    async def of(self, run_dir: Path) -> AsyncIterator[Watch]:
        """Watch a run while the block lasts. Raises ``StorageError``: its progress cannot be read."""
        watch = self._watches.setdefault(run_dir, Watch(run_dir, self._readers))
        watch.users += 1
        try:
            await watch.begin()
            if not self.is_looking:
                self._task = asyncio.create_task(self._look_after_all())
            yield watch
        finally:
            watch.users -= 1
            if not watch.users:
                self._watches.pop(run_dir, None)
                if not self._watches and self._task is not None:
                    self._task.cancel()
                    self._task = None

    @contextmanager
    def driving(self, run_dir: Path) -> Iterator[Callable[[Written], None]]:
        """Look at a run's file no more while the block lasts: who drives the run, in this process, calls what
        this gives, from any thread, each time that the file says something else.
        """
        loop = asyncio.get_running_loop()

        def tell(written: Written) -> None:
            loop.call_soon_threadsafe(self._tell, run_dir, written)

        self._driven.add(run_dir)
        try:
            yield tell
        finally:
            self._driven.discard(run_dir)

    def _tell(self, run_dir: Path, written: Written) -> None:
        if (watch := self._watches.get(run_dir)) is not None:
            watch.tell(written)

    def wake(self) -> None:
        """Let everybody go on who waits: the head stops."""
        for watch in self._watches.values():
            watch.wake()

    async def _look_after_all(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL)
            watches = [watch for run_dir, watch in self._watches.items() if run_dir not in self._driven]
            for watch, written in await _in(self._readers, _news_of, watches) if watches else ():
                if watch.run_dir not in self._driven:  # else what is heard since is newer
                    watch.tell(written)
            self.looks += 1
            self.files += len(watches)


async def _in(readers: Executor, do: Callable[..., _Result], /, *arguments: Any) -> _Result:
    return await asyncio.get_running_loop().run_in_executor(readers, do, *arguments)


def _news_of(watches: Sequence[Watch]) -> list[tuple[Watch, Written]]:
    """Look at each. What cannot be read now is looked at again."""
    found = []
    for watch in watches:
        with suppress(StorageError):
            if (written := watch.look()) is not None:
                found.append((watch, written))
    return found


def _stamp_of(path: Path) -> _Stamp | None:
    try:
        status = path.stat()
    except OSError:  # who reads it finds out what is wrong
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
