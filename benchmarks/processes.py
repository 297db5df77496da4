"""What processes cost, as the Linux kernel counts it in proc(5). Imports the standard library only: peers
measure with it in virtualenvs of their own.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PARENT, _SESSION, _USER, _SYSTEM = 1, 3, 11, 12
"""Places in /proc/PID/stat behind the command's name (fields 4, 6, 14 and 15 of proc(5))."""


def session(leader: int) -> list[int]:
    """Return the processes of a session: a worker and the children that it forked."""
    return [pid for pid, fields in _all() if int(fields[_SESSION]) == leader]


def descendants(ancestor: int) -> list[int]:
    """Return the processes that a process has started, and those have started."""
    children: dict[int, list[int]] = {}
    for pid, fields in _all():
        children.setdefault(int(fields[_PARENT]), []).append(pid)
    found: list[int] = []
    unseen = [ancestor]
    while unseen:
        born = children.get(unseen.pop(), [])
        found += born
        unseen += born
    return found


def cpu_of(pids: list[int]) -> float:
    """Return the CPU time, user and system, of those processes that live."""
    stats = [_stat(Path(f"/proc/{pid}")) for pid in pids]
    return sum(int(fields[_USER]) + int(fields[_SYSTEM]) for fields in stats if fields) / _TICKS


def cpu_seconds(leader: int) -> float:
    """Return the CPU time, user and system, of all living processes of a session."""
    return cpu_of(session(leader))


def peak_megabytes(leader: int) -> float:
    """Return the sum of the peak resident memory (VmHWM) of a session's processes, in MB."""
    return sum(map(peak_of, session(leader)))


def own_peak_megabytes() -> float:
    """Return this process's peak resident memory (VmHWM), in MB."""
    return peak_of(os.getpid())


def peak_of(pid: int) -> float:
    """Return the peak resident memory (VmHWM) of one process, in MB; 0 if it has ended."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return 0.0
    return int(found.group(1)) * 1024 / 1e6 if found else 0.0


def pss_of(pid: int) -> float:
    """Return the proportional set size (Pss of proc(5)) of one process, in MB; 0 if it has ended.

    What processes share is divided among them, so a sum over all of them counts it once.
    """
    try:
        found = re.search(r"Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text())
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return 0.0
    return int(found.group(1)) * 1024 / 1e6 if found else 0.0


def name_of(pid: int) -> str:
    """Return the name of the program that a process runs; nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment that a process was started with; nothing if it has ended."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return dict(variable.partition("=")[::2] for variable in text.split("\0"))


def _all() -> list[tuple[int, list[str]]]:
    stats = [(int(entry.name), _stat(entry)) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [(pid, fields) for pid, fields in stats if fields]


def _stat(process: Path) -> list[str]:
    try:
        return (process / "stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return []
