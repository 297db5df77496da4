"""What is known of a fleet, as Prometheus metrics. Pure: a record in, metric families out."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from gym_queue import names
from gym_queue.records import FailureClass, RunState, Stage
from gym_queue.telemetry import catalogue as the

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gym_queue.census import Census, Fleet, WorkerStanding
    from gym_queue.telemetry.catalogue import Family

KINDS = ("gpu", "cpu")
"""Kinds of workers that are shown even where there are none."""

UNKNOWN = "unknown"
"""The kind of a worker that has claimed work and not yet said what it is."""


def families(fleet: Fleet) -> Iterator[Family]:
    """Yield all metrics of a fleet; those of a part that could not be asked are left out."""
    yield the.LEDGER_UP.family().add(fleet.census is not None)
    yield the.BROKER_UP.family().add(fleet.depths is not None)
    if fleet.servers is not None:
        yield the.SERVERS.family().add(fleet.servers)
    if fleet.workers is not None:
        yield from _of_workers(fleet.workers)
    if fleet.census is not None:
        yield from _of_census(fleet.census)
    if fleet.depths is not None:
        depth = the.DEPTH.family()
        for stage, tickets in fleet.depths.items():
            depth.add(tickets, names.QUEUE_OF_STAGE[stage])
        yield depth


def _of_workers(workers: Sequence[WorkerStanding]) -> Iterator[Family]:
    number, slots, used, silence = Counter[str](), Counter[str](), Counter[str](), dict.fromkeys(KINDS, 0.0)
    round_trip = the.ROUND_TRIP.family()
    for worker in workers:
        kind = worker.kind or UNKNOWN
        number[kind] += 1
        slots[kind] += worker.slots
        used[kind] += worker.used
        silence[kind] = max(silence.get(kind, 0.0), worker.age)
        if worker.round_trip is not None:
            round_trip.add(worker.round_trip, worker.worker, kind)
    counted, held, ages = the.WORKERS.family(), the.SLOTS.family(), the.LEASE_AGE.family()
    for kind, age in silence.items():
        counted.add(number[kind], kind)
        held.add(used[kind], kind, "used")
        held.add(max(0, slots[kind] - used[kind]), kind, "free")
        ages.add(age, kind)
    yield from (counted, held, ages, round_trip)


def _of_census(census: Census) -> Iterator[Family]:
    totals, runs, ended = census.totals, the.RUNS.family(), the.ENDED.family()
    for state in RunState:
        runs.add(census.runs.get(state, 0), state.value)
    rollouts, failed, tokens = the.ROLLOUTS.family(), the.FAILED.family(), the.TOKENS.family()
    for name in ("queued", "in_flight", "unarchived"):
        rollouts.add(getattr(census, name), name)
    for name in ("succeeded", "failed", "cancelled"):
        ended.add(getattr(totals, name), name)
    for failure_class in FailureClass:
        failed.add(totals.failures.get(failure_class, 0), failure_class.value)
    tokens.add(totals.prompt_tokens, "prompt").add(totals.completion_tokens, "completion")
    tickets, oldest = the.TICKETS.family(), the.OLDEST.family()
    for stage in Stage:
        if (line := census.waiting.get(stage)) is not None:
            tickets.add(line.tickets, names.QUEUE_OF_STAGE[stage])
            oldest.add(line.oldest, names.QUEUE_OF_STAGE[stage])
    yield from (runs, rollouts, ended, failed, tokens, tickets, oldest)
    yield the.ACCEPTED.family().add(totals.accepted)
    yield the.DELAYED.family().add(census.delayed)
    yield the.RETRIED.family().add(totals.retried)
    yield the.LOST.family().add(totals.lost)
    yield the.REFUSED.family().add(totals.refused)
    yield the.REPUBLISHED.family().add(totals.republished)
    yield the.DROPPED.family().add(totals.dropped)
