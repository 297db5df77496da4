"""What machine and which versions the numbers depend on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from gym_queue.embedded.redis import find_redis_server, version_of


@dataclass(frozen=True)
class Machine:
    """What the numbers depend on. ``load`` is the machine's load average when it was asked."""

    cores: int
    cpu: str
    system: str
    load: float
    python: str
    redis: str
    celery: str
    kombu: str
    redis_py: str

    def __str__(self) -> str:
        return (
            f"{self.cores} cores, {self.cpu}, {self.system}, load {self.load:.1f} at the start; "
            f"Python {self.python}, Redis {self.redis}, Celery {self.celery}, kombu {self.kombu}, "
            f"redis-py {self.redis_py}"
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
        load=os.getloadavg()[0],
        python=platform.python_version(),
        redis=".".join(map(str, version_of(answer))),
        celery=version("celery"),
        kombu=version("kombu"),
        redis_py=version("redis"),
    )
