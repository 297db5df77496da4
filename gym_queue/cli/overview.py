"""``gym-queue workers`` and ``gym-queue status``: the fleet at a glance."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import click

from gym_queue import assembly
from gym_queue.cli.configuration import load_settings
from gym_queue.cli.explanation import Pace, free_slots
from gym_queue.cli.flags import AS_JSON, OF_STACK
from gym_queue.cli.lookup import connected, with_redis_of
from gym_queue.cli.runs import table
from gym_queue.cli.wording import columns, count, duration
from gym_queue.records import Stage
from gym_queue.redis_address import without_password

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

    from gym_queue.ledger.base import Lease, Ledger
    from gym_queue.settings import Settings

_HEAD = ("WORKER", "KIND", "NODE", "LAST HEARTBEAT", "SLOTS", "USED", "FREE", "STATE")


@click.command()
@OF_STACK
@AS_JSON
def workers(output: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """List the workers that have a lease: when each was last heard of, and what room it has."""
    settings = load_settings()
    leases = asyncio.run(_leases(settings, output))
    pace = Pace.of(settings)
    for line in as_lines(leases, pace) if as_json else worker_table(leases, pace):
        click.echo(line)


@click.command()
@OF_STACK
def status(output: Path | None) -> None:
    """Show on one screen: Redis, runs, workers, and what waits."""
    asyncio.run(_show(load_settings(), output))


async def _leases(settings: Settings, output: Path | None) -> list[Lease]:
    async with connected(with_redis_of(settings, output)) as ledger:
        return await _workers(ledger)


async def _workers(ledger: Ledger) -> list[Lease]:
    return [lease for lease in await ledger.leases() if not lease.is_server]


def as_lines(leases: Sequence[Lease], pace: Pace) -> Iterator[str]:
    """Yield a JSON object for each worker: what it says of itself, and what is seen of it."""
    for lease in leases:
        seen = {"worker": lease.worker, "age": lease.age, "silent": pace.is_silent(lease)}
        yield json.dumps(lease.info | seen)


def worker_table(leases: Sequence[Lease], pace: Pace) -> Iterator[str]:
    """Yield the lines that list workers."""
    if not leases:
        yield "no workers"
        return
    rows = []
    for lease in leases:
        free = free_slots(lease)
        rows.append(
            (
                *(lease.worker, lease.info.get("kind", "?"), lease.info.get("node", "?")),
                f"{duration(lease.age)} ago",
                lease.info.get("slots") or "?",
                lease.info.get("used") or "?",
                "?" if free is None else str(free),
                "silent" if pace.is_silent(lease) else "healthy",
            )
        )
    yield from columns(_HEAD, rows)


async def _show(settings: Settings, output: Path | None) -> None:
    settings = with_redis_of(settings, output)
    async with connected(settings) as ledger:
        async for line in _screen(settings, ledger):
            click.echo(line)


async def _screen(settings: Settings, ledger: Ledger) -> AsyncIterator[str]:
    yield f"Redis at {without_password(settings.redis_url)} answers"
    standing, leases = await ledger.runs(), await _workers(ledger)
    pace = Pace.of(settings)
    silent = sum(pace.is_silent(lease) for lease in leases)
    fleet = f"{count(len(leases), 'worker')}" + (f" ({silent:,} silent)" if silent else "")
    yield f"{count(len(standing), 'run')}, {fleet}"
    yield ""
    for line in (*table(standing), "", *worker_table(leases, pace), ""):
        yield line
    broker = assembly.make_broker(settings)
    try:
        rows = [
            (stage.value, (await ledger.waiting(stage, 0.0, 0))[0], await broker.depth(stage))
            for stage in Stage
        ]
    finally:
        await broker.close()
    for line in columns(("STAGE", "TICKETS WAITING", "IN THE BROKER"), rows):
        yield line
