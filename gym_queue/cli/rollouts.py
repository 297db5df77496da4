"""``gym-queue why`` and ``gym-queue cancel``: one rollout."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from gym_queue.cli.answer import answer
from gym_queue.cli.configuration import load_settings
from gym_queue.cli.flags import OF_RUN
from gym_queue.cli.lookup import look_up, place_of
from gym_queue.errors import UsageError
from gym_queue.maintenance.cancel import cancel_rollout
from gym_queue.records import rollout_id

if TYPE_CHECKING:
    from pathlib import Path

    from gym_queue.cli.lookup import Place, Subject
    from gym_queue.settings import Settings


@click.command()
@click.argument("rollout")
@OF_RUN
def why(rollout: str, output: Path | None) -> None:
    """Say what ROLLOUT waits for, since when, and what will happen next."""
    click.echo(asyncio.run(_why(load_settings(), place_of(rollout), output)))


@click.command()
@click.argument("rollout")
@OF_RUN
def cancel(rollout: str, output: Path | None) -> None:
    """End ROLLOUT as cancelled, for good, whatever it is doing."""
    click.echo(asyncio.run(_cancel(load_settings(), place_of(rollout), output)))


async def _why(settings: Settings, place: Place, output: Path | None) -> str:
    async with look_up(settings, place.run_id, output) as subject:
        _check_exists(place, subject)
        return await answer(place, subject)


async def _cancel(settings: Settings, place: Place, output: Path | None) -> str:
    async with look_up(settings, place.run_id, output) as subject:
        _check_exists(place, subject)
        ledger, _ = subject.standing()
        before = await ledger.whereabouts(*place)
        if await cancel_rollout(ledger, *place, reason="gym-queue cancel"):
            return f"cancelled: it was {before.state if before else 'waiting'}"
        msg = f"{rollout_id(*place)} is not open: {await answer(place, subject)}"
        raise UsageError(msg)


def _check_exists(place: Place, subject: Subject) -> None:
    """Refuse a rollout that the run will never have."""
    spec = subject.status.spec if subject.status else None
    if subject.files is not None:
        spec = spec or subject.files.manifest.spec
        examples = subject.files.manifest.examples
        if place.example_index >= examples:
            msg = f"run {place.run_id} has no example {place.example_index}: it has 0 to {examples - 1}"
            raise UsageError(msg)
    if spec is not None and place.sample_index >= spec.samples:
        msg = f"run {place.run_id} has no sample {place.sample_index}: it has 0 to {spec.samples - 1}"
        raise UsageError(msg)
