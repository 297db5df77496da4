"""What processes cost, as the Linux kernel counts it in proc(5), and what machine they ran on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from gym_queue.embedded.redis import find_redis_server, version_of

_TICKS = os.sysconf("SC_CLK_TCK")
_SESSION, _USER, _SYSTEM = 3, 11, 12
"""Places in /proc/PID/stat behind the command's name (fields 6, 14 and 15 of proc(5))."""


def session(leader: int) -> list[int]:
    """Return the processes of a session: a worker and the children that it forked."""
    return [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and (fields := _stat(entry)) and int(fields[_SESSION]) == leader
    ]


def cpu_seconds(leader: int) -> float:
    """Return the CPU time, user and system, of all living processes of a session."""
    stats = [_stat(Path(f"/proc/{pid}")) for pid in session(leader)]
    return sum(int(fields[_USER]) + int(fields[_SYSTEM]) for fields in stats if fields) / _TICKS


def peak_megabytes(leader: int) -> float:
    """Return the sum of the peak resident memory (VmHWM) of a session's processes, in MB."""
    return sum(_peak_bytes(pid) for pid in session(leader)) / 1e6


def own_peak_megabytes() -> float:
    """Return this process's peak resident memory (VmHWM), in MB."""
    return _peak_bytes(os.getpid()) / 1e6


def peak_of(pid: int) -> float:
    """Return the peak resident memory (VmHWM) of one process, in MB; 0 if it has ended."""
    return _peak_bytes(pid) / 1e6


def _peak_bytes(pid: int) -> int:
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return 0
    return int(found.group(1)) * 1024 if found else 0


def _stat(process: Path) -> list[str]:
    try:
        return (process / "stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return []


@dataclass(frozen=True)
class Machine:
    """What the numbers depend on."""

    cores: int
    cpu: str
    system: str
    python: str
    redis: str
    celery: str
    kombu: str
    redis_py: str

    def __str__(self) -> str:
        return (
            f"{self.cores} cores, {self.cpu}, {self.system}; Python {self.python}, Redis {self.redis}, "
            f"Celery {self.celery}, kombu {self.kombu}, redis-py {self.redis_py}"
        )

    def as_dict(self) -> dict[str, object]:
        """Return the fields, for JSON."""
        return asdict(self)


def describe_machine() -> Machine:
    """Ask the machine what it is."""
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    answer = subprocess.run(  # noqa: S603 - a redis-server, asked for its version
        [find_redis_server(), "--version"], capture_output=True, text=True, check=True
    ).stdout
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        cpu=model.group(1).strip() if model else platform.processor() or platform.machine(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        redis=".".join(map(str, version_of(answer))),
        celery=version("celery"),
        kombu=version("kombu"),
        redis_py=version("redis"),
    )
