"""Cancels runs and rollouts. Cancelled is final: what is under way is stopped, and late results change
nothing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from gym_queue import endings
from gym_queue.endings import Place
from gym_queue.records import RunState, Timings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gym_queue.ledger.base import Ledger, OpenRollout
    from gym_queue.records import RunSpec

_BATCH = 256


async def cancel_run(ledger: Ledger, run_id: str, reason: str) -> int:
    """Start nothing more of a run, and end all its open rollouts as cancelled. Returns how many.

    Safe to repeat. Whoever dies in the middle of it leaves a cancelled run, which ``finish_cancelled`` ends.
    """
    await ledger.set_run_state(run_id, RunState.CANCELLED)
    status = await ledger.run(run_id)
    if status is None or status.state is not RunState.CANCELLED:  # there is none, or it had ended
        return 0
    ended = 0
    while rollouts := await ledger.open_rollouts(run_id, _BATCH):
        ends = (_cancel(ledger, status.spec, rollout, reason) for rollout in rollouts)
        ended += sum(await asyncio.gather(*ends))
    return ended


async def finish_cancelled(ledger: Ledger) -> int:
    """End what is left open of cancelled runs: their canceller died. Returns how many rollouts."""
    return sum(
        [
            await cancel_run(ledger, status.spec.run_id, "the run was cancelled")
            for status in await ledger.runs()
            if status.state is RunState.CANCELLED and status.accepted > status.ended
        ]
    )


async def cancel_rollout(
    ledger: Ledger, run_id: str, example_index: int, sample_index: int, reason: str
) -> bool:
    """End one rollout as cancelled. Returns false if there is none such that is open."""
    status = await ledger.run(run_id)
    if status is None:
        return False
    for rollout in await ledger.open_rollouts(run_id, status.spec.samples, [example_index]):
        if rollout.sample_index == sample_index:
            return await _cancel(ledger, status.spec, rollout, reason)
    return False


async def cancel_samples(ledger: Ledger, spec: RunSpec, reasons: Mapping[int, str]) -> int:
    """End the open samples of some examples of a run as cancelled, each example's for its reason. Returns how
    many. Safe to repeat.
    """
    rollouts = await ledger.open_rollouts(spec.run_id, len(reasons) * spec.samples, list(reasons))
    ends = (_cancel(ledger, spec, rollout, reasons[rollout.example_index]) for rollout in rollouts)
    return sum(await asyncio.gather(*ends))


async def _cancel(ledger: Ledger, spec: RunSpec, rollout: OpenRollout, reason: str) -> bool:
    place = Place(
        spec=spec,
        example=rollout.example,
        example_index=rollout.example_index,
        sample_index=rollout.sample_index,
    )
    timings = Timings(accepted_at=rollout.accepted_at, ended_at=rollout.seen_at)
    return await ledger.end(spec.run_id, endings.cancelled(place, timings, reason))
