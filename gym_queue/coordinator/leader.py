"""The head that leads: of all heads that share a folder of runs, one at a time drives them.

Who leads is decided by the ledger (``office``), and is a matter of who works, not of what counts: a head that
does not know yet that it leads no more does no harm, because a run's files have a lock, and a batch that
comes twice is written once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from gym_queue import names
from gym_queue.coordinator import run_keys
from gym_queue.coordinator.driver import Driver
from gym_queue.coordinator.office import INTERVAL, TERM, Office
from gym_queue.coordinator.patience import patiently
from gym_queue.coordinator.run_folder import UNFINISHED, RunFolder
from gym_queue.coordinator.runs import known_runs
from gym_queue.coordinator.sidework import beside
from gym_queue.durable import storage_errors
from gym_queue.errors import StorageError
from gym_queue.telemetry.machine import machine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gym_queue.coordinator.driver import Means
    from gym_queue.records import RunState

_log = logging.getLogger(__name__)

_LOOK_INTERVAL = 0.1
_WHOLE_LOOK_INTERVAL = 5.0
_FRESH = 1.0
"""Seconds after a change of the folder in which another one might show the same time."""

_ABANDONED = 3600.0
"""Seconds after which what a head was making when it died is removed."""


class Leader:
    """Drives all runs of a folder while this process holds the office.

    Args:
        folder: where the heads keep runs.
        means: what to drive runs with.
        changed: set by whoever makes a run in this process or wishes something of one (``Runs.changed``).
        term: seconds after which another head may lead if this one was not heard of.
        interval: seconds between two renewals.

    Attributes:
        holder: the name of this process in the office.
        leads: whether this process leads.
    """

    def __init__(
        self,
        folder: Path,
        means: Means,
        changed: asyncio.Event,
        *,
        term: float = TERM,
        interval: float = INTERVAL,
    ) -> None:
        self._folder = folder
        self._means = means
        self._changed = changed
        self.holder = f"{machine()}/{os.getpid()}-{secrets.token_hex(4)}"
        self.leads = False
        self._driven: dict[str, tuple[Driver, asyncio.Task[None]]] = {}
        self._office = Office(
            means.ledger, names.COORDINATOR_OFFICE, self.holder, term=term, interval=interval
        )

    async def run(self) -> None:
        """Lead whenever that is possible, until cancelled: then the office goes to another at once."""
        try:
            while True:
                await self._office.take()
                _log.info("this head leads: it drives the runs of %s", self._folder)
                self.leads = True
                try:
                    async with beside(self._drive_all()) as during:
                        why = await during(self._office.hold())
                finally:
                    self.leads = False
                _log.warning("this head leads no more, and has stopped driving runs: %s", why)
        finally:
            await self._office.resign()

    def more_examples(self, run_id: str) -> None:
        """Say that examples were appended to a run in this process: if it is driven here, they begin now."""
        if run_id in self._driven:
            self._driven[run_id][0].more_examples()

    async def _drive_all(self) -> None:
        """Drive every run that is not over, new ones too, until cancelled."""
        look = _Look(self._folder)
        driven = self._driven = {}
        said = ""
        await self._forget_what_is_over()
        try:
            while True:
                self._changed.clear()
                try:
                    unfinished = await asyncio.to_thread(look.unfinished)
                except StorageError as error:
                    if str(error) != said:
                        said = str(error)
                        _log.error("no new run is taken up: %s", error)
                else:
                    said = ""
                    self._take_up(unfinished, driven)
                for run_id in [run_id for run_id, (_, task) in driven.items() if task.done()]:
                    driven.pop(run_id)[1].result()
                    look.over(run_id)
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_INTERVAL):
                        await self._changed.wait()
        finally:
            tasks = [task for _, task in driven.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            driven.clear()

    async def _forget_what_is_over(self) -> None:
        """Let the ledger forget runs that are over: who drove them may have died just before it did."""
        ledger = self._means.ledger
        for status in await patiently(ledger.runs):
            run_id = status.spec.run_id
            with suppress(StorageError):  # whoever takes it up says so
                if (await asyncio.to_thread(RunFolder(self._folder / run_id).written)).final:
                    await patiently(partial(ledger.forget_run, run_id))

    def _take_up(
        self, unfinished: dict[str, RunState], driven: dict[str, tuple[Driver, asyncio.Task[None]]]
    ) -> None:
        for run_id, wish in unfinished.items():
            if run_id in driven:
                driven[run_id][0].wish(wish)
            else:
                driver = Driver(RunFolder(self._folder / run_id), self._means, wish)
                driven[run_id] = driver, asyncio.create_task(driver.drive(), name=f"run {run_id}")


class _Look:
    """Looks which runs of a folder are not over, and what is wished of them. Blocks.

    The folder is read when it has changed, and now and then, should a file system be late to say so.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen_at = 0
        self._due = 0.0
        self._known: set[str] = set()
        self._unfinished: set[str] = set()

    def unfinished(self) -> dict[str, RunState]:
        """Return wishes by run. Raises ``StorageError``."""
        with storage_errors(f"{self._folder} cannot be read"):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._read_folder()
            return {run_id: RunFolder(self._folder / run_id).wish() for run_id in sorted(self._unfinished)}

    def over(self, run_id: str) -> None:
        """Do not name this run any more."""
        self._unfinished.discard(run_id)

    def _read_folder(self) -> None:
        changed_at = self._folder.stat().st_mtime_ns
        fresh = time.time() - changed_at / 1e9 < _FRESH
        whole = time.monotonic() >= self._due
        if changed_at == self._seen_at and not fresh and not whole:
            return
        if whole:
            self._due = time.monotonic() + _WHOLE_LOOK_INTERVAL
            self._remove_abandoned()
        now = set(known_runs(self._folder))
        new = now - self._known
        self._unfinished |= {run_id for run_id in new if not RunFolder(self._folder / run_id).written().final}
        self._known, self._seen_at = now, changed_at

    def _remove_abandoned(self) -> None:
        """Remove what heads were making when they died."""
        for path in (*self._new_in(self._folder), *self._new_in(self._folder / run_keys.FOLDER)):
            with suppress(FileNotFoundError):  # its maker was only slow
                if time.time() - path.stat().st_mtime < _ABANDONED:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()

    def _new_in(self, folder: Path) -> Iterator[Path]:
        return folder.glob(f"{UNFINISHED}*")
