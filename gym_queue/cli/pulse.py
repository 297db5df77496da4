"""Whether one part of the service lives, here: what a container's health check asks, for little CPU time."""

from __future__ import annotations

import asyncio
import http.client
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from gym_queue.cli.findings import Finding, Level
from gym_queue.errors import GymQueueError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gym_queue.ledger.base import Lease
    from gym_queue.settings import Settings

WORKERS = ("gpu", "cpu")
ROLES = ("head", *WORKERS, "beat", "redis", "flower")

_FLOWER_HERE = "http://127.0.0.1:5555"

_TIMEOUT = 5.0
_MISSED = 3
"""Sweeps that beat may be late with. A broker that is away for a moment costs it one."""


class Answer(NamedTuple):
    """What a server said: its status, and the body."""

    status: int
    text: str


def feel(role: str, settings: Settings) -> Finding:
    """Check that the part of this role, on this machine, does its work."""
    try:
        if role in WORKERS:
            return worker(role, asyncio.run(leases(settings)), settings)
        if role == "beat":
            return beat(settings)
        if role == "redis":
            return redis(settings)
    except GymQueueError as error:
        return Finding(Level.FAIL, role, str(error))
    if role == "flower":
        return server(role, _FLOWER_HERE, "/healthcheck")
    return server(role, head_here(settings), "/health")


def head_here(settings: Settings) -> str:
    """Return the URL of this machine's head, seen from here."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.head_host, settings.head_host)  # noqa: S104
    return f"http://[{host}]:{settings.head_port}" if ":" in host else f"http://{host}:{settings.head_port}"


def redis(settings: Settings) -> Finding:
    """Redis lets us in, is new enough, and forgets nothing."""
    from gym_queue.embedded.preflight import check_redis  # noqa: PLC0415 - redis-py loads slowly
    from gym_queue.redis_address import without_password  # noqa: PLC0415

    version = check_redis(settings.redis_url).get("redis_version")
    return Finding(Level.OK, "redis", f"{without_password(settings.redis_url)} answers, version {version}")


async def leases(settings: Settings) -> list[Lease]:
    """Return the leases of all workers. Raises ``LedgerError`` soon if Redis is away."""
    from gym_queue.assembly import make_ledger  # noqa: PLC0415 - redis-py loads slowly

    ledger = make_ledger(settings, patient=False)
    try:
        return await ledger.leases()
    finally:
        await ledger.close()


def worker(kind: str, known: Sequence[Lease], settings: Settings) -> Finding:
    """The workers of this kind among the processes that can be seen from here renew their leases."""
    from gym_queue.cli.explanation import Pace  # noqa: PLC0415
    from gym_queue.cli.wording import duration  # noqa: PLC0415
    from gym_queue.telemetry.machine import is_running, machine  # noqa: PLC0415

    here = [
        lease
        for lease in known
        if (lease.info.get("machine"), lease.info.get("kind")) == (machine(), kind)
        and is_running(int(lease.info["pid"]))
    ]
    if not here:
        sentence = "no worker on this machine holds a lease: it is still starting, or its log says why not"
        return Finding(Level.FAIL, kind, sentence)
    oldest = max(here, key=lambda lease: lease.age)
    heard = f"{oldest.worker} renewed its lease {duration(oldest.age)} ago"
    if Pace.of(settings).is_silent(oldest):
        return Finding(
            Level.FAIL, kind, f"{heard}, and should every {settings.worker_heartbeat_interval:g} s"
        )
    return Finding(Level.OK, kind, f"{heard}, {oldest.info['used']} of {oldest.info['slots']} slots used")


def beat(settings: Settings) -> Finding:
    """Beat, wherever it is, sends what is due."""
    from gym_queue.cli.wording import duration  # noqa: PLC0415
    from gym_queue.embedded.preflight import last_beat  # noqa: PLC0415 - redis-py loads slowly

    told = last_beat(settings.redis_url)
    if told is None:
        return Finding(
            Level.FAIL, "beat", "nobody sends sweeps, which find dead workers: celery -A beat beat"
        )
    heard = f"{told.node} sent the last sweep {duration(told.age)} ago"
    if told.age > _MISSED * settings.sweep_interval:
        due = f"and one is due every {settings.sweep_interval:g} s: start celery -A beat beat again"
        return Finding(Level.FAIL, "beat", f"{heard}, {due}")
    return Finding(Level.OK, "beat", heard)


def server(subject: str, url: str, path: str, headers: Mapping[str, str] | None = None) -> Finding:
    """A server says that it is well."""
    try:
        answer = get(url, path, headers or {})
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Finding(Level.FAIL, subject, f"{url} does not answer: {error or type(error).__name__}")
    if answer.status != http.client.OK:
        return Finding(Level.FAIL, subject, f"{url}{path} answers {answer.status}: {answer.text[:200]}")
    return Finding(Level.OK, subject, f"{url} answers")


def get(url: str, path: str, headers: Mapping[str, str]) -> Answer:
    """Ask a server.

    Raises:
        OSError, http.client.HTTPException: it does not answer.
        ValueError: the URL is none.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or parts.hostname is None:
        msg = "it is no http:// or https:// URL"
        raise ValueError(msg)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=_TIMEOUT)
    try:
        connection.request("GET", parts.path.rstrip("/") + path, headers=dict(headers))
        answer = connection.getresponse()
        return Answer(answer.status, answer.read(10_000).decode(errors="replace"))
    finally:
        connection.close()
