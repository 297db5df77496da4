"""What ``gym-queue doctor`` looks at, in this order: what must be there for all else comes first."""

from __future__ import annotations

import asyncio
import fcntl
import os
import platform
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gym_queue.cli import pulse
from gym_queue.cli.explanation import Pace
from gym_queue.cli.findings import Finding, Level, says
from gym_queue.cli.wording import count, duration
from gym_queue.errors import GymQueueError, StackError
from gym_queue.settings import variable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gym_queue.ledger.base import Lease
    from gym_queue.settings import Settings

_PACKAGES = ("celery", "kombu", "redis", "pydantic", "torch", "transformers")
_LARGEST_SKEW = 5.0
"""Seconds. Nothing is decided by two clocks; but times in rows and logs of different machines go apart."""

_LITTLE_MEMORY = 0.8
_LITTLE_SPACE, _NO_SPACE = 2 * 1024**3, 64 * 1024**2
"""Bytes free on a disk, below which a run will soon wait for room, and does already."""

_GIB = 1024**3
_UNAUTHORIZED = 401


def examine(settings: Settings, role: str | None = None) -> Iterator[Finding]:
    """Yield what is found, as it is. Heads alone keep runs; without a role there may be one here."""
    yield _versions()
    if "redis_url" in settings.model_fields_set:
        yield from _redis(settings)
    else:
        yield _own_redis()
    if settings.head_server_url:
        yield from _head(settings)
    yield _payloads(settings)
    if role in {None, "head"}:
        yield _runs_dir(Path(settings.runs_dir))
    yield from _disks(settings)
    yield _gpu()


def _versions() -> Finding:
    found = []
    for package in ("gym-queue", *_PACKAGES):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # an optional one, or ourselves in a source tree
            continue
    return Finding(Level.OK, "versions", f"Python {platform.python_version()}, {', '.join(found)}")


def _own_redis() -> Finding:
    from gym_queue.embedded.redis import find_redis_server  # noqa: PLC0415

    name = variable("redis_url")
    try:
        binary = find_redis_server()
    except StackError as error:
        return Finding(Level.FAIL, "redis", str(error))
    return Finding(Level.OK, "redis", f"{name} is not set: a command starts its own, {binary}")


def _redis(settings: Settings) -> Iterator[Finding]:
    """Redis, and what can be known only through it."""
    from gym_queue.embedded.preflight import check_redis, clock_ahead  # noqa: PLC0415 - loads slowly

    try:
        yield pulse.redis(settings)
        yield from _durability(check_redis(settings.redis_url))
        yield _clock(clock_ahead(settings.redis_url))
        yield _beat(pulse.beat(settings))
        yield from _workers(asyncio.run(pulse.leases(settings)), settings)
    except GymQueueError as error:
        yield Finding(Level.FAIL, "redis", str(error))


def _durability(info: dict[str, Any]) -> Iterator[Finding]:
    """Nothing is forgotten when Redis is full, restarts, or its disk is."""
    warn, fail = says(Level.WARN, "redis"), says(Level.FAIL, "redis")
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        yield warn(f"its maxmemory-policy is {policy}: CONFIG SET maxmemory-policy noeviction")
    if not info.get("aof_enabled"):
        yield warn("it keeps no append-only file and may come back empty: CONFIG SET appendonly yes")
    elif info.get("aof_last_write_status") != "ok":
        yield fail("it cannot write its append-only file: look at its log and its disk")
    used, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    if most and used > _LITTLE_MEMORY * most:
        yield warn(f"{used / most:.0%} of its maxmemory is used: raise it, or set {variable('payload_url')}")


def _clock(ahead: float) -> Finding:
    if abs(ahead) <= _LARGEST_SKEW:
        return Finding(Level.OK, "clock", "that of Redis and that of this machine agree")
    where = f"that of Redis is {duration(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} this machine's"
    return Finding(Level.WARN, "clock", f"{where}: set both by NTP, or times in rows and logs mislead")


def _beat(found: Finding) -> Finding:
    """Without beat all goes on until something dies."""
    return found._replace(level=Level.OK if found.level is Level.OK else Level.WARN)


def _workers(known: Sequence[Lease], settings: Settings) -> Iterator[Finding]:
    pace = Pace.of(settings)
    healthy = [lease for lease in known if not pace.is_silent(lease)]
    for lease in known:
        if lease not in healthy:
            left = max(0.0, settings.worker_timeout - lease.age)
            heard = f"{lease.worker} is silent, last heard of {duration(lease.age)} ago"
            yield Finding(Level.WARN, "workers", f"{heard}: it is given up in {duration(left)}")
    for kind, wanted in (("gpu", settings.num_expected_workers), ("cpu", 1)):
        there = sum(lease.info.get("kind") == kind for lease in healthy)
        sentence = f"{count(there, f'{kind} worker')} healthy"
        if there < wanted:
            missing = f"{sentence}, {wanted} expected: start celery -A workers.{kind} worker"
            yield Finding(Level.WARN, "workers", missing)
        else:
            yield Finding(Level.OK, "workers", sentence)


def _head(settings: Settings) -> Iterator[Finding]:
    url, token = settings.head_server_url, settings.auth_token
    yield (alive := pulse.server("head", url, "/health"))
    if alive.level is not Level.OK:
        return
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    allowed = pulse.server("head", url, "/v1/workers", headers)
    if f"answers {_UNAUTHORIZED}" in allowed.sentence:
        what = "does not know this" if token else "asks for a"
        yield Finding(Level.FAIL, "head", f"{url} {what} token: set {variable('auth_token')} to the head's")
    elif allowed.level is not Level.OK:
        yield allowed


def _payloads(settings: Settings) -> Finding:
    from gym_queue.assembly import make_payloads  # noqa: PLC0415

    name = variable("payload_url")
    try:
        payloads = make_payloads(settings)
        if payloads is None:
            return Finding(Level.OK, "payloads", f"{name} is empty: all of them go through Redis")
        payloads.check()
    except GymQueueError as error:
        return Finding(Level.FAIL, "payloads", str(error))
    return Finding(Level.OK, "payloads", f"{settings.payload_url} can be written")


def _runs_dir(folder: Path) -> Finding:
    """The head's folder can be written, and locks hold there: two heads must not write one run."""
    ok, fail = says(Level.OK, "runs"), says(Level.FAIL, "runs")
    name = variable("runs_dir")
    there = existing(folder)
    if there != folder.absolute():
        if os.access(there, os.W_OK | os.X_OK):
            return ok(f"{folder} does not exist yet and can be made")
        return fail(
            f"{folder} does not exist, and {there} cannot be written: set {name} to a folder that can"
        )
    try:
        with (
            tempfile.NamedTemporaryFile(prefix=".doctor-", dir=folder) as first,
            Path(first.name).open() as it,
        ):
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(it, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return ok(f"{folder} can be written, and locks hold there")
    except OSError as error:
        return fail(
            f"{folder} cannot be used ({error}): set {name} to a folder that can be written and locked"
        )
    return fail(f"a lock in {folder} keeps nobody out: two heads could write one run; set {name} elsewhere")


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _disks(settings: Settings) -> Iterator[Finding]:
    """The disks that runs and payloads lie on: each once."""
    folders = [Path(settings.runs_dir)]
    if settings.payload_url and "://" not in settings.payload_url:
        folders.append(Path(settings.payload_url))
    disks = {path.stat().st_dev: path for path in map(existing, folders)}
    for path in disks.values():
        free = shutil.disk_usage(path).free
        level = Level.FAIL if free < _NO_SPACE else Level.WARN if free < _LITTLE_SPACE else Level.OK
        advice = "" if level is Level.OK else ": make room, or runs wait for it"
        yield Finding(level, "disk", f"{free / _GIB:,.1f} GiB free at {path}{advice}")


def _gpu() -> Finding:
    ok, warn = says(Level.OK, "gpu"), says(Level.WARN, "gpu")
    try:
        import pynvml  # noqa: PLC0415 - optional
    except ImportError:
        if Path("/dev/nvidiactl").exists():
            return warn("there is an NVIDIA driver, and nothing to ask it with: pip install 'gym-queue[gpu]'")
        return ok("none is seen; model endpoints and CPUs need none")
    return _devices(pynvml, ok, warn)


def _devices(nvml: Any, ok: Callable[[str], Finding], warn: Callable[[str], Finding]) -> Finding:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if Path("/dev/nvidiactl").exists():
            return warn(
                f"the NVIDIA driver does not answer ({error}): look at nvidia-smi and the kernel's log"
            )
        return ok("none is seen; model endpoints and CPUs need none")
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        names = [nvml.nvmlDeviceGetName(handle) for handle in handles]
        free = [nvml.nvmlDeviceGetMemoryInfo(handle).free / _GIB for handle in handles]
        driver = nvml.nvmlSystemGetDriverVersion()
    except nvml.NVMLError as error:
        return warn(f"a device does not answer ({error}): look at nvidia-smi and the kernel's log")
    finally:
        nvml.nvmlShutdown()
    each = ", ".join(f"{name} with {gib:.0f} GiB free" for name, gib in zip(names, free, strict=True))
    return ok(f"driver {driver}: {each or 'no device'}")
