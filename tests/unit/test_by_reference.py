"""A ledger that keeps what is large elsewhere (G5): when it goes, and what happens when it is lost.

That such a ledger fulfils the whole contract is shown in ``tests/contract``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from gym_queue.ledger.base import Ended, Generated
from gym_queue.ledger.by_reference import ByReference
from gym_queue.ledger.references import KEY, MARK
from gym_queue.records import Example, Group
from tests.contract.ledger_model import summary
from tests.unit.beside import LARGE, Beside, claimed, large_group
from tests.unit.road import RUN, World, group

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def beside(tmp_path: Path) -> Beside:
    return Beside(tmp_path)


# --- what goes by reference, and when it is deleted -------------------------------------------------------


async def test_what_is_small_stays_where_it_was(beside: Beside) -> None:
    tickets = await beside.submit(group(0), group(1))
    await beside.work(*tickets)
    rows = [event.row for event in await beside.inner.events(RUN, "", 10, 0)]
    assert rows == [event.row for event in await beside.events()]
    assert len(rows) == 4
    assert beside.kept() == []


async def test_g5_what_is_large_goes_by_reference(beside: Beside) -> None:
    (ticket,) = await beside.submit(large_group(0), samples=1)
    assert beside.kept() == ["example-0"]
    await beside.pipeline.generate(ticket)
    assert beside.kept() == ["example-0", "trajectory-0.0", "trajectory-0.1"]
    await beside.work(*beside.publisher.take())
    assert beside.kept("row") == ["row-0.0", "row-0.1"]
    for event in await beside.inner.events(RUN, "", 10, 0):
        assert len(event.row) < 1500
    for row in await beside.rows():
        assert row["messages"][0]["content"] == LARGE
        assert row["reward"] == 1.0


async def test_it_is_deleted_when_the_archive_holds_the_row(beside: Beside) -> None:
    await beside.work(*await beside.submit(large_group(0), large_group(1)))
    events = await beside.events()
    places = [f"{event.summary.example_index}.{event.summary.sample_index}" for event in events]
    for archived, event in enumerate(events):
        open_examples = {place[0] for place in places[archived:]}
        assert beside.kept("example") == sorted(f"example-{index}" for index in open_examples)
        for kind in ("row", "trajectory"):
            assert beside.kept(kind) == sorted(f"{kind}-{place}" for place in places[archived:])
        await beside.ledger.acknowledge(RUN, event.position)
    assert beside.kept() == []


async def test_an_example_waits_for_the_last_row_of_its_group(beside: Beside) -> None:
    """Even where the rows are small."""
    beside.world = World(inline=True)
    one, other = await beside.submit(large_group(0), large_group(1))
    for ticket, samples in ((one, (0, 1)), (other, (1,))):
        await beside.ledger.claim(ticket, "gpu", 60)
        for sample in samples:
            place = ticket.example_index, sample
            await beside.ledger.end(RUN, Ended(summary=summary(place, "cancelled"), row=b"{}"))
    await beside.acknowledge_all()
    assert beside.kept() == ["example-1"]
    await beside.ledger.end(RUN, Ended(summary=summary((1, 0), "cancelled"), row=b"{}"))
    await beside.acknowledge_all()
    assert beside.kept() == []


async def test_another_coordinator_leaves_at_most_what_goes_with_the_run(beside: Beside) -> None:
    await beside.work(*await beside.submit(large_group(0)))
    beside.ledger = ByReference(beside.inner, beside.payloads, 4000)
    await beside.acknowledge_all()
    assert beside.kept() == ["example-0"]
    await beside.ledger.forget_run(RUN)
    assert not beside.folder.exists()


async def test_a_small_row_of_a_large_trajectory_takes_it_along(beside: Beside) -> None:
    (ticket,) = await beside.submit(group(0, samples=(0,)))
    generated = await beside.ledger.commit(
        await claimed(beside.ledger, ticket), Generated(payload=LARGE.encode())
    )
    claim = await beside.ledger.claim(generated.ticket, "cpu", 60) if generated.ticket else None
    assert claim is not None
    assert claim.samples[0].payload == LARGE.encode()
    await beside.ledger.commit(
        claim.samples[0].fence, Ended(summary=summary((0, 0), "failed"), row=b'{"error": "small"}')
    )
    assert [event.row for event in await beside.events()] == [b'{"error": "small"}']
    await beside.acknowledge_all()
    assert beside.kept() == []


async def test_what_the_sweep_ends_takes_its_trajectory_along(beside: Beside) -> None:
    (ticket,) = await beside.submit(group(0, samples=(0,)))
    generated = await beside.ledger.commit(
        await claimed(beside.ledger, ticket), Generated(payload=LARGE.encode())
    )
    await claimed(beside.inner, generated.ticket)  # another process
    (owned,) = await beside.ledger.owned("cpu", None, 10)
    assert owned.payload == LARGE.encode()
    await beside.ledger.commit(owned.fence, Ended(summary=summary((0, 0), "failed"), row=b"{}"), revoke=True)
    await beside.acknowledge_all()
    assert beside.kept() == []


async def test_a_large_read_is_cut_short(beside: Beside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_queue.ledger.by_reference._LARGEST_READ", 12_000)
    await beside.work(*await beside.submit(large_group(0), large_group(1)))
    sizes = []
    while events := await beside.events():
        sizes.append(len(events))
        await beside.acknowledge_all()
    assert sizes == [2, 2]
    monkeypatch.setattr("gym_queue.ledger.by_reference._LARGEST_READ", 1)
    await beside.work(*await beside.ledger.accept(RUN, 2, 3, [large_group(2)]))
    assert len(await beside.events()) == 1


@pytest.mark.parametrize("payload", [MARK, MARK + b'{"name": "row-0.0-3-abc"}'])
async def test_nobody_forges_a_reference(beside: Beside, payload: bytes) -> None:
    forged = Group(
        example_index=0,
        samples=(0,),
        example=Example(id="e", environment="world", row={KEY: "example-0-3-abc"}),
    )
    (ticket,) = await beside.submit(forged)
    claim = await beside.ledger.claim(ticket, "gpu", 60)
    assert claim is not None
    assert (claim.example, claim.samples[0].unreadable) == (forged.example, "")
    generated = await beside.ledger.commit(claim.samples[0].fence, Generated(payload=payload))
    claim = await beside.ledger.claim(generated.ticket, "cpu", 60) if generated.ticket else None
    assert claim is not None
    assert (claim.samples[0].payload, claim.samples[0].unreadable) == (payload, "")
    await beside.ledger.commit(claim.samples[0].fence, Ended(summary=summary((0, 0), "failed"), row=payload))
    assert [event.row for event in await beside.events()] == [payload]


async def test_from_outside_an_example_is_what_its_rows_show(beside: Beside) -> None:
    """Without reading what is large: the sweep looks at many."""
    level, much = large_group(0, (0,), level=3), large_group(1, (0,), notes=LARGE)
    tickets = await beside.submit(level, much)
    for ticket in tickets:
        await claimed(beside.ledger, ticket)
    beside.path("example-0").unlink()
    found = [rollout.example for rollout in await beside.ledger.open_rollouts(RUN, 10)]
    assert found == [owned.example for owned in await beside.ledger.owned("cpu", None, 10)]
    assert [(example.id, example.environment, example.extra) for example in found] == [
        ("e0", "world", {"level": 3}),
        ("e1", "world", {"notes": LARGE}),
    ]
    beside.path("example-1").unlink()
    assert [rollout.example for rollout in await beside.ledger.open_rollouts(RUN, 10)][1] == Example(
        id="e1", environment="world", row={}
    )


# --- what is lost ------------------------------------------------------------------------------------------


async def test_g6_a_lost_trajectory_fails_as_infrastructure(beside: Beside) -> None:
    (ticket,) = await beside.submit(large_group(0, (0,)))
    await beside.pipeline.generate(ticket)
    beside.path("trajectory").unlink()
    await beside.work(*beside.publisher.take())
    (row,) = await beside.rows()
    assert (row["state"], row["class"], row["stage"]) == ("failed", "infrastructure", "verify")
    assert row["error"].startswith("its trajectory cannot be read: ")
    assert row["error"].endswith(" is gone")
    status = await beside.ledger.run(RUN)
    assert status is not None
    assert (status.failed, status.retried) == (1, 2)


async def test_g6_a_lost_example_fails_as_infrastructure(beside: Beside) -> None:
    (ticket,) = await beside.submit(large_group(0, (0,), level=3))
    beside.path("example").write_bytes(b"torn")
    await beside.work(ticket)
    (row,) = await beside.rows()
    assert (row["state"], row["class"], row["example_id"]) == ("failed", "infrastructure", "e0")
    assert row["error"].startswith("its example cannot be read: ")


@pytest.mark.parametrize("torn", [True, False])
async def test_g1_a_rollout_whose_row_is_lost_ends_once_as_failed(beside: Beside, *, torn: bool) -> None:
    await beside.work(*await beside.submit(large_group(0, (0,)), group(1, samples=(0,))))
    (whole, _) = await beside.rows()
    if torn:
        beside.path("row").write_bytes(beside.path("row").read_bytes()[:-1])
    else:
        beside.path("row").unlink()
    lost, intact = await beside.events()
    assert (await beside.events()) == [lost, intact]
    row = json.loads(lost.row)
    assert row["error"].startswith("its row was lost: ")
    assert (row["class"], row["stage"], row["messages"], row["trajectory"]) == (
        *("infrastructure", None),
        *([], None),
    )
    same = {"rollout_id", "example_id", "environment", "model", "attempt", "turns", "usage", "timings"}
    assert {name: row[name] for name in same} == {name: whole[name] for name in same}
    assert "reward" not in row
    said = lost.summary
    assert (said.state, said.failure_class, said.reward, said.metrics) == (
        "failed",
        "infrastructure",
        None,
        {},
    )
    assert intact.summary.state == "succeeded"
    await beside.acknowledge_all()
    assert await beside.events() == []


async def test_g2_cancelled_stays_cancelled_when_its_row_is_lost(beside: Beside) -> None:
    await beside.submit(group(0, samples=(0,)))
    await beside.ledger.end(RUN, Ended(summary=summary((0, 0), "cancelled"), row=LARGE.encode()))
    beside.path("row").unlink()
    (event,) = await beside.events()
    row = json.loads(event.row)
    assert (row["state"], row["class"], row["rollout_id"]) == ("cancelled", None, f"{RUN}.0.0")
    assert event.summary.state == "cancelled"
