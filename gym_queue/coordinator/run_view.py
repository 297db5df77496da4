"""How a run looks to those who ask the head: what its folder and the ledger say, put together. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gym_queue.api import RunView
from gym_queue.coordinator.run_folder import request_of
from gym_queue.records import RunState

if TYPE_CHECKING:
    from gym_queue.coordinator.manifest import Manifest
    from gym_queue.coordinator.run_folder import RunFiles
    from gym_queue.records import RunStatus


def view_of(plan: Manifest, files: RunFiles, status: RunStatus | None) -> RunView:
    """Return the view of a run.

    The files must have been read before the ledger was asked: so they hold nothing that the ledger does not
    know, unless it has lost something. Then each says a part, and the larger count is the true one.

    Args:
        plan: what was asked for.
        files: what its folder says.
        status: what the ledger says, ``None``: nothing.
    """
    written, rollouts = files.written, files.written.rollouts
    own = bool(request_of(plan).environments)
    succeeded, failed, cancelled = rollouts.succeeded, rollouts.failed, rollouts.cancelled
    queued = in_flight = 0
    if status is not None and not written.final:
        succeeded = max(succeeded, status.succeeded)
        failed = max(failed, status.failed)
        cancelled = max(cancelled, status.cancelled)
        queued, in_flight = status.queued, status.in_flight
    return RunView(
        run_id=plan.spec.run_id,
        state=_state(files, status),
        closed=own or files.input.closed or written.final,
        examples=plan.examples if own else files.input.rows,
        accepted=succeeded + failed + cancelled + queued + in_flight,
        succeeded=succeeded,
        failed=failed,
        cancelled=cancelled,
        queued=queued,
        in_flight=in_flight,
        archived=rollouts.ended,
        groups=written.decided,
        reward_mean=written.reward_mean,
        waiting_for=None if written.final else files.waiting_for or written.waiting_for,
        spec=plan.spec,
    )


def _state(files: RunFiles, status: RunStatus | None) -> RunState:
    """Return the state: of the files if it is final, for nothing comes after that; else what is wished, for
    the leader makes that true; else the ledger's, for a run may be paused there alone.
    """
    if files.written.final:
        return files.written.state
    if files.wish is not RunState.OPEN or status is None:
        return files.wish
    if status.state is RunState.ENDED:  # its last rows are written down right now
        return RunState.OPEN
    return status.state
