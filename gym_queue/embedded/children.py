"""Child processes of the embedded stack: out of reach of the terminal's Ctrl-C, dead when their parent is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_CRASH = "Fatal Python error: "
_LAUNCHER = Path(__file__).with_name("launcher.py")


def spawn(
    argv: Sequence[str],
    log: Path,
    *,
    death_signal: signal.Signals = signal.SIGKILL,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, its output appended to ``log``.

    On Linux it gets ``death_signal`` when the *thread* that called this ends (prctl(2) counts threads as
    parents), so call it from a thread that lives as long as the child should: the main one, not one of an
    executor.
    """
    launcher = [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), str(int(death_signal))]
    with log.open("ab") as output:
        return subprocess.Popen(  # noqa: S603 - a list of our own making, no shell
            [*launcher, *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=cwd,
            pass_fds=pass_fds,
            start_new_session=True,
        )


def kill_session(child: subprocess.Popen[bytes]) -> None:
    """Kill a child that did not end by itself, with the processes it started, and collect it."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def last_words(log: Path, lines: int = 5, since: int = 0) -> str:
    """Return the last lines of a log on one line, for use in a sentence; ``nothing`` if there are none.

    Of a Python that crashed, these are the first lines of what its fault handler wrote. What stands before
    byte ``since`` is from earlier processes, unless the log was emptied meanwhile.
    """
    tail_bytes = 16384
    size = log.stat().st_size
    with log.open("rb") as source:
        source.seek(max(since if since <= size else 0, size - tail_bytes))
        text = source.read().decode(errors="replace")
    found = [line.strip() for line in text.splitlines() if line.strip()]
    crash = max((number for number, line in enumerate(found) if line.startswith(_CRASH)), default=-lines)
    return " | ".join(found[crash:][:lines]) or "nothing"
