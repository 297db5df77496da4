"""``gym-queue why`` and ``gym-queue cancel``: one rollout."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from gym_queue.cli.configuration import load_settings
from gym_queue.cli.explanation import Pace, Scene, explain, explain_row
from gym_queue.cli.flags import OF_RUN
from gym_queue.cli.lookup import look_up, place_of
from gym_queue.cli.rows import find, in_stream
from gym_queue.coordinator.window import Window
from gym_queue.errors import UsageError
from gym_queue.lifecycle import TERMINAL
from gym_queue.maintenance.cancel import cancel_rollout
from gym_queue.records import rollout_id

if TYPE_CHECKING:
    from pathlib import Path

    from gym_queue.cli.lookup import Place, Subject
    from gym_queue.ledger.base import Ledger
    from gym_queue.output import RolloutRow
    from gym_queue.records import RunStatus
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
        return await _answer(settings, place, subject)


async def _answer(settings: Settings, place: Place, subject: Subject) -> str:
    if subject.ledger is None or subject.status is None:
        return _from_files(place, subject)
    return await _from_ledger(settings, place, subject, subject.ledger, subject.status)


async def _cancel(settings: Settings, place: Place, output: Path | None) -> str:
    async with look_up(settings, place.run_id, output) as subject:
        _check_exists(place, subject)
        ledger, _ = subject.standing()
        before = await ledger.whereabouts(*place)
        if await cancel_rollout(ledger, *place, reason="gym-queue cancel"):
            return f"cancelled: it was {before.state if before else 'waiting'}"
        msg = f"{rollout_id(*place)} is not open: {await _answer(settings, place, subject)}"
        raise UsageError(msg)


async def _from_ledger(
    settings: Settings, place: Place, subject: Subject, ledger: Ledger, status: RunStatus
) -> str:
    whereabouts = await ledger.whereabouts(*place)
    if whereabouts is None or whereabouts.state in TERMINAL:
        # In this order: a row leaves the stream only when it is in the file.
        if row := await in_stream(ledger, place):
            return explain_row(row, "its row waits to be written to the output")
        if ended := _ended(place, subject):
            return ended
        if place.example_index < status.cursor and whereabouts is None:
            where = status.spec.output or "the run's output"
            return f"ended, and archived: its row is in {where}, which cannot be read from here"
    files = subject.files
    scene = Scene(
        example_index=place.example_index,
        sample_index=place.sample_index,
        run=status,
        whereabouts=whereabouts,
        leases=tuple(await ledger.leases()),
        pace=Pace.of(settings),
        window=await Window(ledger, settings.window).size(),
        examples=files.manifest.examples if files else None,
        coordinated=files.coordinated if files else None,
    )
    return explain(scene)


def _from_files(place: Place, subject: Subject) -> str:
    if ended := _ended(place, subject):
        return ended
    if subject.files is not None and subject.files.coordinated:
        return (
            "it has not ended; the run's coordinator is at work, but the run stands in no Redis that answers"
        )
    return "it has not ended, and nobody works on it: the run broke off; submit-rollouts … --resume goes on"


def _ended(place: Place, subject: Subject) -> str | None:
    """Say how a rollout ended, if the files hold its row."""
    if subject.files is None:
        return None
    found: tuple[RolloutRow, Path] | None = find(subject.files.paths, place)
    return explain_row(found[0], f"its row is in {found[1]}") if found else None


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
