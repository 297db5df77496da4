"""Processes that the driver keeps running, as an init system would."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gym_queue.embedded.children import kill_session, last_words, spawn

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Mapping

RESTART_DELAY = 0.2
_WATCH_INTERVAL = 0.02
_MARK = "GYM_QUEUE_CHAOS_MARK"


@dataclass(frozen=True)
class Death:
    """The end of a process: after how many seconds, whose, its status, and whether it was asked for."""

    at: float
    name: str
    pid: int
    status: int
    asked: bool

    def __str__(self) -> str:
        how = signal.Signals(-self.status).name if self.status < 0 else f"status {self.status}"
        return f"{self.name} [{self.pid}] ended with {how}{', as asked' if self.asked else ''}"


@dataclass
class Part:
    """One process of a name, again and again.

    ``again`` are further arguments from the second start on. ``finished`` tells from an exit status whether
    it has done what it was there for. ``wanted`` says whether it is started again when it dies, ``asked`` is
    the id of the process that a fault has ended.
    """

    name: str
    argv: list[str]
    log: Path
    variables: Mapping[str, str]
    again: list[str] = field(default_factory=list)
    finished: Callable[[int], bool] = field(default=lambda _status: False)
    process: subprocess.Popen[bytes] | None = None
    wanted: bool = True
    lives: int = 0
    asked: int | None = None
    due: float | None = None

    @property
    def pid(self) -> int | None:
        """Its id while it runs."""
        return self.process.pid if self.process is not None and self.process.poll() is None else None

    def send(self, number: signal.Signals) -> int | None:
        """Signal the process and its children. Returns its id, or ``None`` if it does not run."""
        pid = self.pid
        if pid is not None:
            os.killpg(pid, number)
        return pid

    def end(self, number: signal.Signals) -> int | None:
        """Signal the process alone to its death, which then surprises nobody. Its children are its affair."""
        pid = self.pid
        if pid is not None:
            self.asked = pid
            os.kill(pid, number)
        return pid


def command_line(pid: int) -> str:
    """Return how a process was started; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


class Processes:
    """All processes of one stack. ``say`` takes a line for the driver's log.

    Use it on the main thread: processes die with the thread that started them (``children.spawn``).
    """

    def __init__(self, folder: Path, variables: Mapping[str, str], say: Callable[[str], None]) -> None:
        self.folder = folder
        self.parts: dict[str, Part] = {}
        self.deaths: list[Death] = []
        self.started = time.monotonic()
        self._mark = secrets.token_hex(8)
        self._variables = {**os.environ, **variables, _MARK: self._mark}
        self._say = say

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def add(self, name: str, argv: list[str], variables: Mapping[str, str] | None = None) -> Part:
        """Start a process and keep it running."""
        part = Part(name, argv, self.folder / f"{name}.log", {**self._variables, **(variables or {})})
        self.parts[name] = part
        self.start(part)
        return part

    def start(self, part: Part) -> None:
        """Start a part, again if it ended."""
        again = part.again if part.lives else []
        part.due, part.wanted, part.lives = None, True, part.lives + 1
        part.process = spawn([*part.argv, *again], part.log, environment=part.variables, cwd=self.folder)
        self._say(f"{part.name} [{part.process.pid}] started")

    async def supervise(self) -> None:
        """Note who dies and start it again. Ends only by being cancelled."""
        while True:
            for part in list(self.parts.values()):
                self.look_after(part)
            await asyncio.sleep(_WATCH_INTERVAL)

    def look_after(self, part: Part) -> None:
        """Start a part that is due, or note that it died."""
        process = part.process
        if process is None:
            if part.wanted and part.due is not None and time.monotonic() >= part.due:
                self.start(part)
            return
        status = process.poll()
        if status is None:
            return
        part.process = None
        if part.finished(status):
            part.wanted = False
        death = Death(self.now, part.name, process.pid, status, not part.wanted or part.asked == process.pid)
        self.deaths.append(death)
        self._say(str(death) if death.asked else f"{death}; its last words: {last_words(part.log, 3)}")
        part.due = time.monotonic() + RESTART_DELAY

    def living(self) -> Iterator[int]:
        """Yield the ids of all processes that come from here, whoever started them: they carry our mark."""
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self._mark.encode() in (entry / "environ").read_bytes():
                    yield int(entry.name)
            except OSError:  # gone meanwhile, or somebody else's
                continue

    def kill_all(self) -> None:
        """Kill whatever is left, and collect it."""
        for part in self.parts.values():
            part.wanted = False
            if part.process is not None:
                kill_session(part.process)
        for pid in self.living():
            os.kill(pid, signal.SIGKILL)
