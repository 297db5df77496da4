"""Who takes part: peers, each in its own virtualenv, and the road itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.stand import Contender
from benchmarks.virtualenvs import interpreter_of, python_of

if TYPE_CHECKING:
    from collections.abc import Callable

WORKERS = 2
CELERY = "plain Celery"
CELERY_IGNORE = "Celery, ignore_result"
DRAMATIQ, TASKIQ, RQ, RAY, NEMO = "dramatiq", "taskiq", "rq", "Ray", "NeMo Gym"
LIST, STREAM = "bare list", "bare stream"


def road(verifiers: int = 1, **variables: str) -> Contender:
    """Return the road: two GPU workers, and a CPU worker with so many children."""
    gpu = ["-m", "celery", "--quiet", "-A", "workers.gpu", "worker", "-n", "gpu%number@%h"]
    cpu = ["-m", "celery", "--quiet", "-A", "workers.cpu", "worker", "-n", "cpu@%h"]
    cpu += ["--concurrency", str(verifiers)]
    return Contender(
        name="road",
        client=["-m", "benchmarks.road"],
        workers=[gpu] * WORKERS,
        verifiers=[cpu],
        variables=variables,
        ours=True,
    )


def _celery(variant: str) -> Contender:
    worker = ["-m", "celery", "--quiet", "-A", "benchmarks.peers.celery_peer", "worker", "-c", str(WORKERS)]
    return Contender(
        name=CELERY_IGNORE if variant else CELERY,
        client=["-m", "benchmarks.peers.celery_peer"],
        workers=[worker],
        python=python_of("queues"),
        variables={"BENCHMARK_VARIANT": variant},
    )


def _dramatiq() -> Contender:
    module = "benchmarks.peers.dramatiq_peer"
    worker = ["-m", "dramatiq", module, "--processes", str(WORKERS), "--threads", "8"]
    return Contender(DRAMATIQ, ["-m", module], [worker], python=python_of("queues"))


def _taskiq() -> Contender:
    module = "benchmarks.peers.taskiq_peer"
    worker = [
        "-m",
        "taskiq",
        "worker",
        f"{module}:broker",
        "--workers",
        str(WORKERS),
        "--log-level",
        "WARNING",
    ]
    return Contender(TASKIQ, ["-m", module], [worker], python=python_of("queues"))


def _rq() -> Contender:
    module = "benchmarks.peers.rq_peer"
    workers = [["-m", module, "work"]] * WORKERS
    return Contender(RQ, ["-m", module], workers, python=python_of("queues"))


def _bare(variant: str) -> Contender:
    module = "benchmarks.peers.bare_peer"
    return Contender(
        name=STREAM if variant else LIST,
        client=["-m", module],
        workers=[["-m", module, "work"]] * WORKERS,
        python=python_of("queues"),
        variables={"BENCHMARK_VARIANT": variant},
    )


def _ray() -> Contender:
    return Contender(RAY, ["-m", "benchmarks.peers.ray_peer"], python=python_of("ray"), drains=False)


def _nemo() -> Contender:
    interpreter = interpreter_of("BENCHMARK_NEMO_PYTHON", "python3.13", "python3.12")
    python = python_of("nemo", interpreter)
    return Contender(NEMO, ["-m", "benchmarks.peers.nemo_peer"], python=python, drains=False)


PEERS: dict[str, Callable[[], Contender]] = {
    CELERY: lambda: _celery(""),
    CELERY_IGNORE: lambda: _celery("ignore_result"),
    DRAMATIQ: _dramatiq,
    TASKIQ: _taskiq,
    RQ: _rq,
    RAY: _ray,
    NEMO: _nemo,
    LIST: lambda: _bare(""),
    STREAM: lambda: _bare("stream"),
}
"""By name; making one installs it. Raises ``virtualenvs.NotInstalledError``."""

LARGE = (RAY, NEMO)
"""Those that take long to download and to start: left out of a quick run."""

TASKS = {CELERY: 2000, CELERY_IGNORE: 2000, DRAMATIQ: 4000, TASKIQ: 4000, RQ: 2000, RAY: 4000, NEMO: 800}
"""How many tasks a round takes, for a rate that is known to be moderate; others take as many as the road."""
