"""What one rollout waits for, or how it ended: asks the ledger and the files that know it. The command and
the head say the same.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from gym_queue.cli.explanation import Pace, Scene, explain, explain_row
from gym_queue.cli.rows import find, in_stream
from gym_queue.coordinator.window import Window
from gym_queue.lifecycle import TERMINAL

if TYPE_CHECKING:
    from pathlib import Path

    from gym_queue.cli.lookup import Place, Subject
    from gym_queue.ledger.base import Ledger
    from gym_queue.output import RolloutRow
    from gym_queue.records import RunStatus


async def answer(place: Place, subject: Subject) -> str:
    """Say in one sentence what a rollout of ``subject`` waits for, since when, and what will happen next."""
    if subject.ledger is None or subject.status is None:
        return await asyncio.to_thread(_from_files, place, subject)
    return await _from_ledger(place, subject, subject.ledger, subject.status)


async def _from_ledger(place: Place, subject: Subject, ledger: Ledger, status: RunStatus) -> str:
    whereabouts = await ledger.whereabouts(*place)
    if whereabouts is None or whereabouts.state in TERMINAL:
        # In this order: a row leaves the stream only when it is in the file.
        if row := await in_stream(ledger, place):
            return explain_row(row, "its row waits to be written to the output")
        if ended := await asyncio.to_thread(_ended, place, subject):
            return ended
        if place.example_index < status.cursor and whereabouts is None:
            where = status.spec.output or "the run's output"
            return f"ended, and archived: its row is in {where}, which cannot be read from here"
    scene = Scene(
        example_index=place.example_index,
        sample_index=place.sample_index,
        run=status,
        whereabouts=whereabouts,
        leases=tuple(await ledger.leases()),
        pace=Pace.of(subject.settings),
        window=await Window(ledger, subject.settings.window).size(),
        examples=subject.examples,
        coordinated=subject.coordinated,
    )
    return explain(scene)


def _from_files(place: Place, subject: Subject) -> str:
    if ended := _ended(place, subject):
        return ended
    if subject.headed:
        waits = subject.waiting_for or "no head has begun the run; gym-queue head starts one that does"
        return f"not accepted yet: {waits}"
    if subject.coordinated:
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
