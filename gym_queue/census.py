"""What the ledger counts over all runs, as records: what a fleet's metrics are made of."""

from __future__ import annotations

from typing import Protocol

from pydantic import Field

from gym_queue.records import FailureClass, Record, RunState, Stage


class Line(Record):
    """Tickets that wait for a worker at one stage. ``oldest`` is how many seconds the first of them has
    waited; 0.0 if there is none.
    """

    tickets: int = 0
    oldest: float = 0.0


class Totals(Record):
    """Rollouts, attempts, tickets and tokens since the ledger was empty, runs that it has forgotten included.

    None of them ever falls, unless Redis itself loses what it knew. ``RunStatus`` says what most of them
    mean; tokens are those of rollouts that ended with a trajectory, as the engine counts them.
    """

    accepted: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    retried: int = 0
    lost: int = 0
    refused: int = 0
    republished: int = 0
    dropped: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failures: dict[FailureClass, int] = Field(default_factory=dict)


class Census(Record):
    """All that the ledger counts, at one moment.

    Args:
        totals: see ``Totals``.
        runs: runs that it has not forgotten, by state.
        queued: rollouts of those that no worker has begun.
        in_flight: rollouts of those that a worker has begun and that have not ended.
        unarchived: rollouts of those that have ended and whose rows no file holds yet.
        delayed: retries that wait out their backoff.
        waiting: what waits for a worker, by stage.
    """

    totals: Totals = Totals()
    runs: dict[RunState, int] = Field(default_factory=dict)
    queued: int = 0
    in_flight: int = 0
    unarchived: int = 0
    delayed: int = 0
    waiting: dict[Stage, Line] = Field(default_factory=dict)


FAILURE = "failed:"
"""Begin of a counter's name; the failure class follows."""

LASTING = (
    *(name for name in Totals.model_fields if name != "failures"),
    *(f"{FAILURE}{failure_class}" for failure_class in FailureClass),
)
"""Counters of a run that go into the totals when it is forgotten."""

PASSING = ("queued", "archived")
"""Counters of a run that are of use only while it is there."""


def totals_of(counters: dict[str, int]) -> Totals:
    """Read ``LASTING`` counters."""
    failures = {
        failure_class: count
        for failure_class in FailureClass
        if (count := counters.get(f"{FAILURE}{failure_class}", 0))
    }
    plain = {name: counters.get(name, 0) for name in Totals.model_fields if name != "failures"}
    return Totals(**plain, failures=failures)


class WorkerStanding(Record):
    """One worker as its last heartbeat described it, ``age`` seconds ago. ``kind`` is empty until the first.

    ``round_trip`` is how many seconds the last probe was on its way to it and noted by it; of one that is
    still on its way, how long it has been.
    """

    worker: str
    kind: str = ""
    age: float = 0.0
    slots: int = 0
    used: int = 0
    round_trip: float | None = None


class Fleet(Record):
    """What is known of a whole fleet at one moment. ``None`` for what could not be asked: the ledger, or the
    broker, of whose queues ``depths`` are the messages. ``servers`` is how many are registered.
    """

    census: Census | None = None
    workers: tuple[WorkerStanding, ...] | None = None
    servers: int | None = None
    depths: dict[Stage, int] | None = None


class Surveyed(Protocol):
    """What a ledger (``ledger.base.Ledger``) tells of the whole fleet. Each method is one atomic step."""

    async def census(self) -> Census:
        """Count what is known of all runs, those that were forgotten included, at one moment."""
        ...

    async def probe(self) -> int:
        """Ask all workers that hold a lease, and have said what they are, to say that they are there; but not
        those that were asked and have not answered yet. Returns how many.
        """
        ...

    async def answer_probe(self, worker: str) -> bool:
        """Say that a worker is there, and how long that took. Returns false if nobody asked."""
        ...
