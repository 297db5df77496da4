"""The sweep does all its duties, each whatever became of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.errors import LedgerError
from gym_queue.ledger.base import Retry
from gym_queue.maintenance.sweep import sweep
from gym_queue.records import Limits, RunState
from gym_queue.settings import Settings
from tests.unit.road import RUN, group
from tests.unit.silent_fleet import TIMEOUT, Broker, Fleet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.records import Ticket

SETTINGS = Settings(worker_timeout=TIMEOUT, sweep_interval=1.0)
DUTIES = {"reap": "leases", "expire": "open_rollouts", "cancel": "set_run_state", "audit": "promote_due"}


class Post(Broker):
    """Broker and publisher in one."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__()
        self.fleet = fleet

    async def publish(self, tickets: Sequence[Ticket]) -> None:
        await self.fleet.publisher.publish(tickets)


async def all_needed() -> Fleet:
    """Return a fleet in which each duty has something to do."""
    fleet = Fleet()
    limits = Limits(queue_timeout=TIMEOUT, retry_base_delay=0.0)
    dead, delayed, *_ = await fleet.submit(*(group(index, [0]) for index in range(3)), limits=limits)
    await fleet.claim(dead, "dead")
    claim = await fleet.claim(delayed, "gpu")
    await fleet.ledger.commit(claim.samples[0].fence, Retry(delay=1.0))
    unwanted = (await fleet.ledger.run(RUN)).spec.model_copy(update={"run_id": "unwanted"})  # type: ignore[union-attr]
    await fleet.ledger.open_run(unwanted, "unwanted")
    await fleet.ledger.accept("unwanted", 0, 1, [group(0, [0])])
    await fleet.ledger.set_run_state("unwanted", RunState.CANCELLED)
    fleet.clock.pass_(TIMEOUT + 1)
    return fleet


async def done(fleet: Fleet) -> set[str]:
    duties = set()
    if "dead" not in await fleet.workers():
        duties.add("reap")
    if [row["class"] for row in await fleet.rows()].count("timeout"):
        duties.add("expire")
    if await fleet.ledger.events("unwanted", "", 10, 0):
        duties.add("cancel")
    if any(ticket.example_index == 1 for ticket in fleet.publisher.tickets):
        duties.add("audit")
    return duties


@pytest.mark.guarantee("G3", "G4", "G7")
async def test_all_duties_are_done() -> None:
    fleet = await all_needed()
    await sweep(fleet.ledger, Post(fleet), SETTINGS, None)
    assert await done(fleet) == set(DUTIES)


@pytest.mark.parametrize("broken", DUTIES)
@pytest.mark.parametrize("error", [LedgerError("Redis is away"), ZeroDivisionError("a bug")], ids=repr)
async def test_one_that_fails_stops_no_other(
    broken: str, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = await all_needed()

    async def fail(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(fleet.ledger, DUTIES[broken], fail)
        await sweep(fleet.ledger, Post(fleet), SETTINGS, None)
    assert broken in caplog.text
    assert str(error) in caplog.text
    missed = {broken} | ({"cancel"} if broken == "expire" else set())  # these two ask the same
    assert await done(fleet) == set(DUTIES) - missed
    await sweep(fleet.ledger, Post(fleet), SETTINGS, None)
    assert await done(fleet) == set(DUTIES)


async def test_what_stops_several_duties_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = await all_needed()

    async def away(*_: Any) -> Any:
        raise LedgerError("Redis is away")

    for name in ("leases", "runs", "promote_due"):
        monkeypatch.setattr(fleet.ledger, name, away)
    await sweep(fleet.ledger, Post(fleet), SETTINGS, None)
    assert caplog.text.count("Redis is away") == 1
    assert "reap, expire, cancel, audit" in caplog.text
