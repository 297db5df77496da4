"""What processes cost, as the Linux kernel counts it in proc(5). Imports the standard library only: peers
measure with it in virtualenvs of their own.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_TICKS = os.sysconf("SC_CLK_TCK")
_PARENT, _SESSION, _USER, _SYSTEM = 1, 3, 11, 12
"""Places in /proc/PID/stat behind the command's name (fields 4, 6, 14 and 15 of proc(5))."""

_MAPPING = re.compile(
    r"^[0-9a-f]+-[0-9a-f]+ \S+ (\S+) (\S+) (\d+).*\n(?:[A-Z]\w*:.*\n)*?"
    r"Rss: +(\d+) kB\n(?:[A-Z]\w*:.*\n)*?Anonymous: +(\d+) kB",
    re.MULTILINE,
)
"""One of /proc/PID/smaps: offset, device and inode, then its kB in memory, and those of them of no file."""


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


def memory_in_all(groups: Mapping[str, Iterable[int]]) -> dict[str, float]:
    """Return the MB that all of these processes take now, as if they were alone on the machine.

    By group: memory that belongs to no file (``Pss_Anon``), where pages that forked processes share count
    once. ``files``: what is mapped of files and shared memory, each mapping once for all, as large as it is
    in the process that uses most of it. A sum of ``Pss`` would divide those by every stranger that runs the
    same interpreter, and say less on a busy machine.
    """
    files: dict[str, int] = {}
    found = {name: sum(_anonymous(pid, files) for pid in pids) * 1024 / 1e6 for name, pids in groups.items()}
    return found | {"files": sum(files.values()) * 1024 / 1e6}


def _anonymous(pid: int, files: dict[str, int]) -> int:
    """Return the kB of a process that belong to no file; note the others by mapping."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        mappings = Path(f"/proc/{pid}/smaps").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return 0
    for offset, device, inode, resident, anonymous in _MAPPING.findall(mappings):
        if inode != "0":
            mapping = f"{device} {inode} {offset}"
            files[mapping] = max(files.get(mapping, 0), int(resident) - int(anonymous))
    own = re.search(r"^Pss_Anon:\s+(\d+) kB", rollup, re.MULTILINE)
    return int(own.group(1)) if own else 0


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
