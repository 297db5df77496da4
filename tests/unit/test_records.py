from __future__ import annotations

from gym_queue.records import RunSpec, RunState, RunStatus


def test_a_runs_counters_add_up() -> None:
    run = RunStatus(
        spec=RunSpec(run_id="r", model="stub:", samples=1),
        state=RunState.OPEN,
        accepted=20,
        queued=7,
        succeeded=4,
        failed=3,
        cancelled=1,
        archived=6,
    )
    assert run.ended == 8
    assert run.in_flight == 5  # begun, and not ended
    assert run.open == 14  # accepted, and not yet safe in the archive
