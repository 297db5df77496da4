"""What a head shows to Prometheus: the ledger's facts, whoever asks and whatever is away."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from gym_queue.census import Census, Fleet, Line, Totals, WorkerStanding
from gym_queue.errors import BrokerError, LedgerError
from gym_queue.ledger.base import SERVER
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.maintenance import survey
from gym_queue.maintenance.survey import FleetMetrics
from gym_queue.records import FailureClass, RunState, Stage
from gym_queue.telemetry import catalogue
from gym_queue.telemetry.fleet_metrics import families
from tests.unit.prometheus import samples
from tests.unit.prometheus import shown as numbers

if TYPE_CHECKING:
    import pytest

    from gym_queue.ledger.base import Lease

CENSUS = Census(
    totals=Totals(
        accepted=100,
        succeeded=50,
        failed=20,
        cancelled=10,
        retried=3,
        lost=4,
        refused=5,
        republished=6,
        dropped=7,
        prompt_tokens=1000,
        completion_tokens=2000,
        failures={FailureClass.TIMEOUT: 15, FailureClass.MODEL: 5},
    ),
    runs={RunState.OPEN: 2},
    queued=11,
    in_flight=9,
    unarchived=8,
    delayed=1,
    waiting={Stage.GENERATE: Line(tickets=12, oldest=1.5), Stage.VERIFY: Line()},
)
WORKERS = (
    WorkerStanding(worker="g1", kind="gpu", age=2.0, slots=256, used=200, round_trip=0.25),
    WorkerStanding(worker="g2", kind="gpu", age=31.0, slots=256, used=256),
    WorkerStanding(worker="new"),
)
FLEET = Fleet(census=CENSUS, workers=WORKERS, servers=3, depths={Stage.GENERATE: 13, Stage.VERIFY: 0})


def test_a_fleet_is_shown_in_numbers() -> None:
    shown = numbers(families(FLEET))
    assert {
        "gym_queue_ledger_up": 1,
        "gym_queue_broker_up": 1,
        "gym_queue_workers{kind=gpu}": 2,
        "gym_queue_servers": 3,
        "gym_queue_workers{kind=cpu}": 0,
        "gym_queue_workers{kind=unknown}": 1,
        "gym_queue_slots{kind=gpu,state=used}": 456,
        "gym_queue_slots{kind=gpu,state=free}": 56,
        "gym_queue_lease_age_seconds{kind=gpu}": 31,
        "gym_queue_worker_round_trip_seconds{kind=gpu,worker=g1}": 0.25,
        "gym_queue_runs{state=open}": 2,
        "gym_queue_runs{state=paused}": 0,
        "gym_queue_rollouts{state=queued}": 11,
        "gym_queue_rollouts{state=in_flight}": 9,
        "gym_queue_rollouts{state=unarchived}": 8,
        "gym_queue_rollouts_accepted_total": 100,
        "gym_queue_rollouts_ended_total{state=succeeded}": 50,
        "gym_queue_rollouts_ended_total{state=failed}": 20,
        "gym_queue_rollouts_ended_total{state=cancelled}": 10,
        "gym_queue_rollouts_failed_total{class=timeout}": 15,
        "gym_queue_rollouts_failed_total{class=stale}": 0,
        "gym_queue_tokens_total{kind=prompt}": 1000,
        "gym_queue_tokens_total{kind=completion}": 2000,
        "gym_queue_queue_depth{queue=rollouts.default}": 13,
        "gym_queue_queue_tickets{queue=rollouts.default}": 12,
        "gym_queue_queue_oldest_seconds{queue=rollouts.default}": 1.5,
        "gym_queue_queue_oldest_seconds{queue=verify.default}": 0,
        "gym_queue_retries_delayed": 1,
        "gym_queue_attempts_retried_total": 3,
        "gym_queue_attempts_lost_total": 4,
        "gym_queue_writes_refused_total": 5,
        "gym_queue_tickets_republished_total": 6,
        "gym_queue_tickets_dropped_total": 7,
    }.items() <= shown.items()
    assert "gym_queue_worker_round_trip_seconds{kind=gpu,worker=g2}" not in shown  # it was never probed
    assert shown["process_resident_memory_bytes"] > 0


def test_all_that_is_defined_is_shown_and_nothing_else() -> None:
    assert {family.metric.name for family in families(FLEET)} == {
        definition.name.removesuffix("_total") for definition in catalogue.FLEET
    }


class Broker:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.there = True

    async def depth(self, stage: Stage) -> int:
        self.asked += stage is Stage.GENERATE
        if not self.there:
            raise BrokerError
        return 5


async def test_many_who_ask_at_once_cost_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker()
    metrics = FleetMetrics(MemoryLedger(), broker)
    texts = await asyncio.gather(*(metrics.render() for _ in range(20)))
    assert (broker.asked, len(set(texts))) == (1, 1)
    monkeypatch.setattr(survey, "_FRESH", 0.0)
    await metrics.render()
    monkeypatch.setattr(metrics, "_until", 0.0)
    await metrics.render()
    assert broker.asked == 2


async def test_one_who_gives_up_leaves_the_others_their_answer() -> None:
    metrics = FleetMetrics(MemoryLedger(), Broker())
    impatient = asyncio.create_task(metrics.render())
    other = asyncio.create_task(metrics.render())
    await asyncio.sleep(0)
    impatient.cancel()
    assert b"gym_queue_ledger_up 1.0" in await other


async def test_a_broker_that_is_away_is_a_number_not_an_error() -> None:
    broker = Broker()
    broker.there = False
    shown = samples(await FleetMetrics(MemoryLedger(), broker).render())
    assert shown["gym_queue_broker_up"] == 0
    assert shown["gym_queue_ledger_up"] == 1
    assert "gym_queue_queue_depth{queue=rollouts.default}" not in shown


async def test_a_ledger_that_is_away_or_silent_is_a_number_too() -> None:
    class Away(MemoryLedger):
        async def census(self) -> Census:
            raise LedgerError

        async def leases(self) -> list[Lease]:
            await asyncio.Event().wait()
            raise AssertionError

    fleet = await survey.survey(Away(), Broker(), patience=0.01)
    assert (fleet.census, fleet.workers) == (None, None)
    assert numbers(families(fleet))["gym_queue_ledger_up"] == 0


async def test_servers_are_no_workers() -> None:
    ledger = MemoryLedger()
    await ledger.heartbeat("server-1", {"kind": SERVER})
    await ledger.heartbeat("gpu-1", {"kind": "gpu", "slots": "4", "used": "1"})
    shown = samples(await FleetMetrics(ledger, Broker()).render())
    assert (shown["gym_queue_servers"], shown["gym_queue_workers{kind=gpu}"]) == (1, 1)
    assert not [name for name in shown if "kind=server" in name]
