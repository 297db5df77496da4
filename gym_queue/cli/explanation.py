"""What a rollout waits for, since when, and what will happen next: records in, one sentence out.

Pure functions: whoever calls has asked the ledger and the files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from gym_queue.cli.wording import count, cut, duration
from gym_queue.ledger.base import Lease, Whereabouts
from gym_queue.lifecycle import RUNNING_STATE, TERMINAL, WAITING_STATE
from gym_queue.output import FailedRow, RolloutRow, SucceededRow
from gym_queue.records import Record, RunState, RunStatus, Stage

if TYPE_CHECKING:
    from gym_queue.settings import Settings

KIND_OF_STAGE = {Stage.GENERATE: "gpu", Stage.VERIFY: "cpu"}
"""Which workers serve a stage, by the kind that their leases name."""

_STAGE_OF_WAITING = {state: stage for stage, state in WAITING_STATE.items()}
_STAGE_OF_RUNNING = {state: stage for stage, state in RUNNING_STATE.items()}
_LONGEST_REASON = 300


class Pace(Record):
    """The settings that say when something happens, in seconds."""

    heartbeat_interval: float
    worker_timeout: float
    sweep_interval: float

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Take it from the settings."""
        return cls(
            heartbeat_interval=settings.worker_heartbeat_interval,
            worker_timeout=settings.worker_timeout,
            sweep_interval=settings.sweep_interval,
        )

    def is_silent(self, lease: Lease) -> bool:
        """Tell whether a worker has missed more than one heartbeat."""
        return lease.is_silent(self.heartbeat_interval)


class Scene(Record):
    """One rollout that is not known to have ended, and what is around it.

    ``window`` is how many rollouts of all runs together may be accepted and not yet archived. ``examples`` is
    the length of the run's input, ``coordinated`` whether a coordinator is at work on the run; both are
    ``None`` where that cannot be seen from here.
    """

    example_index: int
    sample_index: int
    run: RunStatus
    whereabouts: Whereabouts | None
    leases: tuple[Lease, ...]
    pace: Pace
    window: int
    examples: int | None = None
    coordinated: bool | None = None


def explain(scene: Scene) -> str:
    """Say what a rollout waits for, since when, and what will happen next."""
    where = scene.whereabouts
    if where is None:
        return _not_accepted(scene)
    if where.state in TERMINAL:
        return f"{where.state}: it has ended, and its row is on its way to the output"
    if stage := _STAGE_OF_RUNNING.get(where.state):
        return _running(scene, where, stage)
    return _waiting(scene, where, _STAGE_OF_WAITING[where.state])


def explain_row(row: RolloutRow, place: str) -> str:
    """Say how a rollout ended. ``place`` says where its row is."""
    took = duration(row.timings.ended_at - row.timings.accepted_at)
    facts = [f"attempt {row.attempt}"] if row.attempt else []
    match row:
        case SucceededRow(reward=reward):
            facts.append("no reward asked for" if reward is None else f"reward {reward:g}")
        case FailedRow(failure_class=str() as failure_class, stage=stage, error=error):
            facts.append(f"{failure_class} at {stage}: {cut(error or '', _LONGEST_REASON)}")
        case FailedRow(error=str() as error):
            facts.append(cut(error, _LONGEST_REASON))
    return f"ended: {row.state} {took} after it was accepted ({', '.join(facts)}); {place}"


def _not_accepted(scene: Scene) -> str:
    run = scene.run
    total = f" of {scene.examples:,}" if scene.examples is not None else ""
    start = f"not accepted yet: the run's cursor is at example {run.cursor:,}{total}"
    if run.state is not RunState.OPEN:
        return f"{start}, and {_halted(run)}"
    if scene.coordinated is False:
        return f"{start}, and no coordinator is at work on it: go on with submit-rollouts … --resume"
    return (
        f"{start}, and {run.open:,} of its rollouts are accepted and not yet archived, in a window of "
        f"{scene.window:,} for all runs; it is accepted as room appears"
    )


def _halted(run: RunStatus) -> str:
    if run.state is RunState.PAUSED:
        return "the run is paused, and nothing new starts until gym-queue runs resume"
    if run.state is RunState.CANCELLED:
        return "the run is cancelled, and this rollout with it: the next sweep ends what is still open"
    return "the run has ended"


def _waiting(scene: Scene, where: Whereabouts, stage: Stage) -> str:
    run = scene.run
    before = f"attempt {where.attempt - 1} ended: {_reason(where)}" if where.attempt > 1 else ""
    if where.since > where.seen_at:
        left = duration(where.since - where.seen_at)
        sentence = f"waits {left} more before attempt {where.attempt}" + (f" ({before})" if before else "")
        return f"{sentence}; {_halted(run)}" if _is_held(run, stage) else sentence
    start = f"{where.state} for {duration(where.seen_at - where.since)} (attempt {where.attempt})"
    parts = [f"{start}: {_halted(run) if _is_held(run, stage) else _hope(scene, where, stage)}"]
    if run.state is RunState.OPEN:  # nothing else ends for having waited too long
        parts.append(_queue_end(where, run))
    return "; ".join([*parts, before] if before else parts)


def _is_held(run: RunStatus, stage: Stage) -> bool:
    """Tell whether the run's state keeps this stage from beginning (a paused run goes on verifying)."""
    return run.state is not RunState.OPEN and not (run.state is RunState.PAUSED and stage is Stage.VERIFY)


def _hope(scene: Scene, where: Whereabouts, stage: Stage) -> str:
    """Say who could take the rollout."""
    kind = KIND_OF_STAGE[stage]
    leases = [lease for lease in scene.leases if lease.info.get("kind") == kind]
    healthy = [lease for lease in leases if not scene.pace.is_silent(lease)]
    if not healthy:
        heard = min((lease.age for lease in leases), default=None)
        last = f" (the last one to be heard of has been silent for {duration(heard)})" if heard else ""
        return f"no {kind.upper()} worker is alive{last}; start one with celery -A workers.{kind} worker"
    ahead = f"{_are(where.ahead, 'ticket')} ahead" if where.ahead else "no ticket has waited longer"
    # What a worker says of its slots is as old as its heartbeat: it counts if the rollout waited already.
    free = sum(free_slots(lease) or 0 for lease in healthy if lease.age < where.seen_at - where.since)
    if free <= where.ahead:
        return f"waits for a {kind.upper()} worker with a free slot, {ahead}"
    sweep = duration(scene.pace.sweep_interval)
    return (
        f"waits for a {kind.upper()} worker to take it, {ahead} and {_are(free, 'slot')} free; should its "
        f"ticket be lost, the sweep (every {sweep}) sends it again"
    )


def _are(number: int, noun: str) -> str:
    return f"{count(number, noun)} {'is' if number == 1 else 'are'}"


def free_slots(lease: Lease) -> int | None:
    """Return how many more rollouts a worker could take, ``None`` if it does not say."""
    slots, used = lease.info.get("slots", ""), lease.info.get("used", "")
    return max(0, int(slots) - int(used)) if slots.isdigit() and used.isdigit() else None


def _queue_end(where: Whereabouts, run: RunStatus) -> str:
    waited = where.seen_at - max(where.since, run.opened_at)
    left = min(run.spec.limits.queue_timeout - waited, _left_of_all(where, run))
    if left <= 0:
        return "its time is over, so the next sweep fails it as timeout"
    return f"it is failed as timeout in {duration(left)} if none takes it"


def _running(scene: Scene, where: Whereabouts, stage: Stage) -> str:
    start = f"{where.state} for {duration(where.seen_at - where.since)} (attempt {where.attempt}) on"
    lease = next((lease for lease in scene.leases if lease.worker == where.worker), None)
    parts = [f"{start} {where.worker}, {_pulse(lease, scene.pace)}"]
    if scene.run.state is RunState.CANCELLED:
        parts.append("the run is cancelled, so its worker is told to stop")
    elif lease is not None and not scene.pace.is_silent(lease):
        parts.append(_stage_end(where, scene.run, stage))
    if where.attempt > 1:
        parts.append(f"attempt {where.attempt - 1} ended: {_reason(where)}")
    return "; ".join(parts)


def _pulse(lease: Lease | None, pace: Pace) -> str:
    """Say how its worker does, and what follows if that is badly."""
    if lease is None:
        return "which has no lease any more; the rollout runs elsewhere as soon as its work is handed back"
    age, limit = duration(lease.age), duration(pace.worker_timeout)
    if lease.age > pace.worker_timeout:
        return f"which has been silent for {age}: the next sweep gives it up and the rollout runs elsewhere"
    if pace.is_silent(lease):
        return f"which has been silent for {age}; it is given up at {limit} and the rollout runs elsewhere"
    return f"whose last heartbeat was {age} ago"


def _left_of_all(where: Whereabouts, run: RunStatus) -> float:
    """Return the seconds that the whole rollout still has: its time starts anew when its run is opened."""
    return run.spec.limits.rollout_timeout - (where.seen_at - max(where.accepted_at, run.opened_at))


def _stage_end(where: Whereabouts, run: RunStatus, stage: Stage) -> str:
    limits = run.spec.limits
    allowed = limits.generate_timeout if stage is Stage.GENERATE else limits.verify_timeout
    left = min(allowed - (where.seen_at - where.since), _left_of_all(where, run))
    if left > 0:
        return f"deadline in {duration(left)}, then it is failed as timeout"
    late = f"its time for that was over {duration(-left)} ago"
    claim = where.deadline - where.seen_at if where.deadline is not None else 0.0
    if claim <= 0:
        return f"{late}: the next sweep fails it as timeout"
    rest = "verifies or stores it" if stage is Stage.GENERATE else "stores it"
    return f"{late}: its worker {rest}, or a sweep fails it as timeout in {duration(claim)}"


def _reason(where: Whereabouts) -> str:
    return cut(where.reason, _LONGEST_REASON) or "the ledger does not know why"
