"""A ledger that keeps what is large elsewhere, where processes die and stores are away or elsewhere (G3)."""

from __future__ import annotations

import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.errors import LedgerError, PayloadsNotSharedError
from gym_queue.ledger.base import Ended, Generated
from gym_queue.ledger.by_reference import ByReference
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.ledger.payloads import Payloads
from gym_queue.records import Stage
from tests.contract.ledger_model import summary
from tests.unit.beside import LARGE, Beside, claimed, large_group
from tests.unit.road import RUN, Road, World, group
from tests.unit.small_stack import FlakyLedger, Output, Stack, everything

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gym_queue.ledger.base import Receipt


@pytest.fixture
def beside(tmp_path: Path) -> Beside:
    return Beside(tmp_path)


# --- processes that cannot see the payloads ----------------------------------------------------------------


@pytest.mark.parametrize("elsewhere", [True, False], ids=["another folder", "no folder"])
async def test_a_process_that_cannot_read_says_which_setting_is_wrong(
    beside: Beside, tmp_path: Path, *, elsewhere: bool
) -> None:
    (ticket,) = await beside.submit(large_group(0, (0,)))
    payloads = Payloads(str(tmp_path / "elsewhere"), "") if elsewhere else None
    other = ByReference(beside.inner, payloads, 4000, patience=0.0)
    claim = await other.claim(ticket, "cpu", 60)
    assert claim is not None
    assert claim.samples[0].unreadable.startswith("its example cannot be read: GYM_QUEUE_PAYLOAD_URL is ")
    await other.commit(claim.samples[0].fence, Ended(summary=summary((0, 0), "failed"), row=b"{}"))
    assert [event.row for event in await other.events(RUN, "", 10, 0)] == [b"{}"]


@pytest.mark.parametrize("elsewhere", [True, False], ids=["another folder", "no folder"])
async def test_rows_that_cannot_be_read_here_are_not_taken_for_lost(
    beside: Beside, tmp_path: Path, *, elsewhere: bool
) -> None:
    await beside.work(*await beside.submit(large_group(0, (0,))))
    payloads = Payloads(str(tmp_path / "elsewhere"), "") if elsewhere else None
    with pytest.raises(PayloadsNotSharedError, match="GYM_QUEUE_PAYLOAD_URL"):
        await ByReference(beside.inner, payloads, 4000).events(RUN, "", 10, 0)
    assert len(await beside.events()) == 1


async def test_a_process_that_cannot_write_leaves_it_in_the_ledger_and_says_so_once(
    beside: Beside, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (ticket,) = await beside.submit(group(0))
    other = ByReference(beside.inner, Payloads(str(tmp_path / "elsewhere"), ""), 4000)
    claim = await other.claim(ticket, "gpu", 60)
    assert claim is not None
    for sample in claim.samples:
        place = 0, sample.fence.sample_index
        outcome = Ended(summary=summary(place, "failed"), row=LARGE.encode())
        assert (await other.commit(sample.fence, outcome)).accepted
    assert [event.row for event in await beside.events()] == [LARGE.encode()] * 2
    (record,) = caplog.records
    assert "what is large stays in Redis: GYM_QUEUE_PAYLOAD_URL is" in record.getMessage()


# --- crashes, and stores that are away ---------------------------------------------------------------------


class Crash(Exception):  # noqa: N818 - no error: the process ends here
    pass


class DyingLedger(MemoryLedger):
    """Dies (or answers nothing) in its next commit, before or after it was done."""

    dies: str = ""

    async def commit(self, *arguments: Any, **options: Any) -> Receipt:
        when, self.dies = self.dies, ""
        if when == "before":
            raise Crash
        receipt = await super().commit(*arguments, **options)
        if when == "after":
            raise Crash
        if when == "unanswered":
            raise LedgerError
        return receipt


@pytest.mark.parametrize("dies", ["before", "after", "unanswered"])
async def test_g3_a_crash_between_file_and_step_leaves_at_most_a_file(tmp_path: Path, dies: str) -> None:
    inner = DyingLedger()
    road = Road(world=World(inline=False), ledger=ByReference(inner, Payloads(str(tmp_path), ""), 0))
    (ticket,) = await road.submit(large_group(0, (0,)))
    fence = await claimed(road.ledger, ticket)
    inner.dies = dies
    with pytest.raises((Crash, LedgerError)):
        await road.ledger.commit(fence, Generated(payload=b"trajectory"))
    again = await road.ledger.commit(fence, Generated(payload=b"trajectory"))  # whoever died or not
    assert again.accepted is (dies == "before")
    (waiting,) = (await road.ledger.waiting(Stage.VERIFY, 0, 10))[1]
    claim = await road.ledger.claim(waiting, "cpu", 60)
    assert claim is not None
    assert claim.samples[0].payload == b"trajectory"
    await road.ledger.forget_run(RUN)
    assert Payloads(str(tmp_path), "").opened_before(0.0) == []


async def test_a_store_that_takes_nothing_stops_the_step(beside: Beside, tmp_path: Path) -> None:
    """So nothing refers to what was not written, and the same call works later."""
    (ticket,) = await beside.submit(group(0, samples=(0,)))
    fence = await claimed(beside.ledger, ticket)
    shutil.move(beside.folder, tmp_path / "away")
    beside.folder.touch()
    outcome = Ended(summary=summary((0, 0), "failed"), row=LARGE.encode())
    for _ in range(2):
        with pytest.raises(LedgerError, match=str(tmp_path)):
            await beside.ledger.commit(fence, outcome)
    assert await beside.inner.events(RUN, "", 10, 0) == []
    beside.folder.unlink()
    shutil.move(tmp_path / "away", beside.folder)
    assert (await beside.ledger.commit(fence, outcome)).accepted
    assert [event.row for event in await beside.events()] == [LARGE.encode()]


async def test_a_store_that_reads_nothing_is_no_lost_row(beside: Beside, tmp_path: Path) -> None:
    await beside.work(*await beside.submit(large_group(0, (0,))))
    path = beside.path("row")
    path.rename(tmp_path / "away")
    path.mkdir()  # reading it fails, and not because it is gone
    with pytest.raises(LedgerError, match="IsADirectoryError"):
        await beside.events()
    path.rmdir()
    (tmp_path / "away").rename(path)
    assert [row["state"] for row in await beside.rows()] == ["succeeded"]


async def test_a_claim_waits_for_a_store_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    road = Beside(tmp_path)
    (ticket,) = await road.submit(large_group(0, (0,)))
    road.folder.rename(tmp_path / "away")
    calls = 0
    get = road.payloads.get

    def comes_back(run_id: str, names: Sequence[str]) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            (tmp_path / "away").rename(road.folder)
        return get(run_id, names)

    monkeypatch.setattr(road.payloads, "get", comes_back)
    patient = ByReference(road.inner, road.payloads, 4000, patience=30.0)
    claim = await patient.claim(ticket, "gpu", 60)
    assert claim is not None
    assert (claim.example.row, claim.samples[0].unreadable, calls) == ({"prompt": LARGE}, "", 2)


async def test_what_cannot_be_deleted_stops_nothing(
    beside: Beside, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await beside.work(*await beside.submit(large_group(0, (0,)), samples=1))
    await beside.events()
    shutil.move(beside.folder, tmp_path / "away")
    beside.folder.touch()
    assert await beside.ledger.acknowledge(RUN, (await beside.inner.events(RUN, "", 1, 0))[0].position) == 1
    await beside.ledger.forget_run(RUN)
    assert await beside.ledger.run(RUN) is None
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith(f"3 payloads of run {RUN} are left behind: ")
    assert said[1].startswith(f"payloads of run {RUN} are left behind: ")


class FlakyFiles:
    """Files that cannot be written, read or deleted now and then, before or after it was done."""

    def __init__(self, files: Any, chance: random.Random) -> None:
        self._files = files
        self._chance = chance

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._files, name)

        def call(*arguments: Any) -> Any:
            if self._chance.random() < 0.05:
                raise OSError(5, "Input/output error")
            answer = method(*arguments)
            if self._chance.random() < 0.05:
                raise OSError(5, "Input/output error")
            return answer

        return call


@pytest.mark.parametrize("seed", range(4))
async def test_g1_a_run_whose_ledger_and_store_come_and_go_is_complete(tmp_path: Path, seed: int) -> None:
    payloads = Payloads(str(tmp_path / "payloads"), "")
    chance = random.Random(seed)
    payloads._files = FlakyFiles(payloads._files, chance)
    flaky: Any = FlakyLedger(MemoryLedger(), chance, 0.02)
    stack, output = Stack(ledger=ByReference(flaky, payloads, 0)), Output(tmp_path)
    async with stack.up(), output.coordinator(stack, 20) as coordinator:
        metrics = await coordinator.run()
    assert output.places() == everything(20)
    assert metrics.rollouts.succeeded == 40


async def test_an_example_is_kept_for_samples_that_a_ledger_sent_back_in_time_shows_twice(
    beside: Beside,
) -> None:
    """As after a failover to a replica that lagged behind: what was acknowledged comes again."""
    (ticket,) = await beside.submit(large_group(0))
    await claimed(beside.ledger, ticket)
    await beside.ledger.end(RUN, Ended(summary=summary((0, 0), "cancelled"), row=b"{}"))
    events = beside.inner._runs[RUN].results
    for _ in range(2):
        before = dict(events)
        await beside.acknowledge_all()
        events.update(before)
    assert beside.kept() == ["example-0"]
