"""Every name that two processes must agree on: queues, tasks, Redis keys. Nowhere else is one spelled out."""

from __future__ import annotations

from gym_queue.records import Stage

ROLLOUT_QUEUE = "rollouts.default"
VERIFY_QUEUE = "verify.default"
MAINTENANCE_QUEUE = "maintenance"

COORDINATOR_OFFICE = "coordinator"

GENERATE_TASK = "gym_queue.generate"
VERIFY_TASK = "gym_queue.verify"
SWEEP_TASK = "gym_queue.sweep"

QUEUE_OF_STAGE = {Stage.GENERATE: ROLLOUT_QUEUE, Stage.VERIFY: VERIFY_QUEUE}
TASK_OF_STAGE = {Stage.GENERATE: GENERATE_TASK, Stage.VERIFY: VERIFY_TASK}

KEY_PREFIX = "gq"

BEAT_REMEMBERED = 3 * 86_400
"""Seconds for which ``beat_key`` is kept. Its age is this less what is left of it, whatever clocks say."""


def run_key(run_id: str) -> str:
    """Hash: spec, state, cursor and counters of a run."""
    return f"{KEY_PREFIX}:run:{run_id}"


def runs_key() -> str:
    """Sorted set: ids of the runs that have not ended, by priority."""
    return f"{KEY_PREFIX}:runs"


def totals_key() -> str:
    """Hash: the counters of all runs that were forgotten, summed up."""
    return f"{KEY_PREFIX}:totals"


def idempotency_key(key: str) -> str:
    """String: id of the run that was submitted under this idempotency key."""
    return f"{KEY_PREFIX}:idempotency:{key}"


def group_key(run_id: str, example_index: int) -> str:
    """Hash: one example (``example``), when it was accepted (``at``), how many of its samples are open
    (``open``), and of each sample ``s:`` its state, ``p:`` its payload, ``e:`` why its last attempt ended;
    gone when all of them have ended.
    """
    return f"{groups_prefix(run_id)}{example_index}"


def groups_prefix(run_id: str) -> str:
    """Begin of every ``group_key`` of a run."""
    return f"{KEY_PREFIX}:group:{run_id}:"


def groups_key(run_id: str) -> str:
    """Sorted set: indices of the run's examples that have samples not yet ended."""
    return f"{KEY_PREFIX}:groups:{run_id}"


def results_key(run_id: str) -> str:
    """Stream: rows of ended rollouts that the archive does not hold yet."""
    return f"{KEY_PREFIX}:results:{run_id}"


def waiting_key(stage: Stage) -> str:
    """Sorted set: tickets that should lie in the broker's queue of a stage, by the time they were queued."""
    return f"{KEY_PREFIX}:waiting:{stage}"


def delayed_key() -> str:
    """Sorted set: tickets of retries that wait out their backoff, by the time they are due."""
    return f"{KEY_PREFIX}:delayed"


def claims_key(worker: str) -> str:
    """Sorted set: the attempts that a worker owns, by deadline."""
    return f"{KEY_PREFIX}:claims:{worker}"


def revoked_key(worker: str) -> str:
    """List: attempts that were taken from a worker or ended under it, for it to read. Expires."""
    return f"{KEY_PREFIX}:revoked:{worker}"


def written_key(worker: str) -> str:
    """List: the newest commits of a worker, by the nonces of its calls, so that one whose answer was lost is
    known when it comes again. Expires.
    """
    return f"{KEY_PREFIX}:written:{worker}"


def office_key(office: str) -> str:
    """String: who holds an office, of which there is one holder at a time. Expires with its term."""
    return f"{KEY_PREFIX}:office:{office}"


def leases_key() -> str:
    """Sorted set: workers by the time of their last heartbeat."""
    return f"{KEY_PREFIX}:leases"


def worker_key(worker: str) -> str:
    """Hash: what a worker says of itself with each heartbeat."""
    return f"{KEY_PREFIX}:worker:{worker}"


def beat_key() -> str:
    """String: the machine on which beat last sent what was due. Expires."""
    return f"{KEY_PREFIX}:beat"


def probes_key() -> str:
    """Hash: when a worker was asked to say that it is there, by worker, while it has not."""
    return f"{KEY_PREFIX}:probes"


def round_trips_key() -> str:
    """Hash: how many seconds the last such question was on its way, by worker."""
    return f"{KEY_PREFIX}:round_trips"


def weights_key() -> str:
    """Hash: the newest announced weights by model. Outlives runs, so that no version ever goes back."""
    return f"{KEY_PREFIX}:weights"
