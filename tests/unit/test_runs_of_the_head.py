"""The head's runs: made once, fed in order, steered for good, and shown, whatever dies in between (G8)."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.api import MixPart, RunRequest
from gym_queue.coordinator import progress
from gym_queue.coordinator.metrics import RolloutCounts
from gym_queue.coordinator.progress import ProgressFile, Written
from gym_queue.coordinator.run_folder import RunFolder
from gym_queue.coordinator.runs import Runs, known_runs
from gym_queue.errors import (
    ConflictError,
    EngineUnavailableError,
    StorageError,
    UnknownRunError,
    UsageError,
)
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.maintenance.cancel import cancel_run
from gym_queue.records import GroupPolicy, RunState, Sampling
from gym_queue.settings import Settings
from tests.unit import test_inbox
from tests.unit.road import group
from tests.unit.test_inbox import body
from tests.unit.test_source import _Counted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from gym_queue.api import RunView
    from gym_queue.environments.base import Environment
    from gym_queue.ledger.base import Ledger

REQUEST = RunRequest(model="stub:", samples=2)
KEY = "a key / of any \N{SNOWMAN} letters"


class Broken(_Counted):
    def examples(self, size: int, seed: int) -> Any:
        raise ZeroDivisionError("no world")


def environments(name: str) -> Environment:
    own = {"counted": _Counted(brings=100), "broken": Broken(0)}
    return own[name] if name in own else test_inbox.environments(name)


def check_model(model: str) -> None:
    if model == "http://down/v1":
        raise EngineUnavailableError("http://down/v1 does not answer: connection refused")


class Heads:
    """Heads that share a folder and a ledger."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger: Ledger = MemoryLedger()
        self.checked: list[str] = []
        self._all: list[Runs] = []

    def head(self) -> Runs:
        def check(model: str) -> None:
            self.checked.append(model)
            check_model(model)

        runs = Runs(
            self.ledger,
            self.folder,
            Settings(max_turns=5, tool_timeout=7.0),
            environments=environments,
            check_model=check,
            cancel=partial(cancel_run, self.ledger, reason="the run was cancelled"),
        )
        self._all.append(runs)
        return runs

    async def take_up(self, view: RunView) -> None:
        """Do as a leader does."""
        await self.ledger.open_run(view.spec, view.run_id)

    def write(self, view: RunView, written: Written) -> None:
        ProgressFile(RunFolder(self.folder / view.run_id).paths.run_dir).write(lambda: written)

    def close(self) -> None:
        for runs in self._all:
            runs.close_threads()


@pytest.fixture
async def heads(tmp_path: Path) -> AsyncIterator[Heads]:
    heads = Heads(tmp_path / "runs")
    yield heads
    heads.close()


def ended(succeeded: int, failed: int = 0, cancelled: int = 0) -> RolloutCounts:
    total = succeeded + failed + cancelled
    return RolloutCounts(accepted=None, ended=total, succeeded=succeeded, failed=failed, cancelled=cancelled)


async def test_a_run_begins_with_the_settings_limits_and_those_asked_for(heads: Heads) -> None:
    runs = heads.head()
    view, made = await runs.create(
        RunRequest(
            model="stub:",
            samples=3,
            sampling=Sampling(seed=4),
            limits={"tool_timeout": 3, "max_attempts": 9},
            priority=2,
            weight=0.5,
            groups=GroupPolicy(usable=2),
        )
    )
    assert made
    assert (view.state, view.closed, view.examples, view.accepted) == (RunState.OPEN, False, 0, 0)
    spec = view.spec
    assert (spec.limits.max_turns, spec.limits.tool_timeout, spec.limits.max_attempts) == (5, 3.0, 9)
    assert (spec.samples, spec.sampling.seed, spec.priority, spec.weight) == (3, 4, 2, 0.5)
    assert spec.groups.usable == 2
    assert spec.output.endswith(f":{heads.folder}/{view.run_id}/rollouts.jsonl")
    assert await heads.head().show(view.run_id) == view  # any head shows it
    assert await heads.ledger.runs() == []  # that is the leader's to do


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"limits": {"max_turn": 3}}, "there is no limit 'max_turn'; did you mean max_turns"),
        ({"limits": {"max_turns": 0}}, "the limit max_turns: Input should be greater than or equal to 1"),
        ({"limits": {"tool_timeout": "soon"}}, "the limit tool_timeout: Input should be a valid number"),
        ({"limits": {"tool_timeout": float("inf")}}, "numbers that are infinite"),
        ({"weight": float("inf")}, "numbers that are infinite"),
        ({"environment": "row"}, "there is no environment 'row'; did you mean rows"),
        ({"environments": (MixPart(name="row", size=1),)}, "there is no environment 'row'"),
        ({"environments": (MixPart(name="rows", size=1),)}, "brings no examples of its own"),
        ({"environments": (MixPart(name="broken", size=1),)}, "raised ZeroDivisionError: no world"),
        ({"environments": (MixPart(name="counted", size=1),) * 1001}, "1,000 environments at most"),
        ({"environments": (MixPart(name="counted", size=10**9),)}, "100,000,000 examples at most"),
        ({"samples": 10**9}, "samples may be 10,000 at most"),
        ({"priority": -(10**400)}, "priority may be 1,000,000 at most"),
        ({"groups": GroupPolicy(usable=3)}, "3 usable samples of a group are not possible: it has 2"),
        ({"samples": 1, "groups": GroupPolicy(drop_uniform=True)}, "all would be dropped"),
        ({"model": "stub:\ud800"}, "text that is not Unicode"),
        ({"model": "http://down/v1"}, "http://down/v1 does not answer: connection refused"),
    ],
)
async def test_what_cannot_work_is_refused_and_leaves_nothing(
    heads: Heads, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        await heads.head().create(REQUEST.model_copy(update=changes), KEY)
    assert known_runs(heads.folder) == []
    assert (await heads.head().create(REQUEST, KEY))[1]  # the key is not used up


@pytest.mark.guarantee("G8")
async def test_g8_one_key_one_run_for_all_heads_at_once(heads: Heads) -> None:
    several = [heads.head() for _ in range(4)]
    answers = await asyncio.gather(*(runs.create(REQUEST, KEY) for runs in several for _ in range(5)))
    assert len({view.run_id for view, _ in answers}) == 1
    assert sum(made for _, made in answers) == 1
    assert len(known_runs(heads.folder)) == 1
    other, made = await heads.head().create(REQUEST, "another key")
    assert made
    assert other.run_id != answers[0][0].run_id


@pytest.mark.guarantee("G8")
async def test_g8_a_key_outlives_the_ledger_the_run_and_its_model(heads: Heads) -> None:
    view, _ = await heads.head().create(REQUEST, KEY)
    heads.write(view, Written(state=RunState.ENDED, rollouts=ended(4)))
    heads.ledger = MemoryLedger()
    again, made = await heads.head().create(REQUEST, KEY)
    assert (again.run_id, again.state, made) == (view.run_id, RunState.ENDED, False)
    assert heads.checked == ["stub:"]  # the model may be gone by now
    for other in (REQUEST.model_copy(update={"samples": 3}), RunRequest(model="stub:x", samples=2)):
        with pytest.raises(ConflictError, match=f"was used for run {view.run_id} with another request"):
            await heads.head().create(other, KEY)


@pytest.mark.guarantee("G8")
@pytest.mark.parametrize("step", ["gym_queue.coordinator.run_keys.sync_directory", "pathlib.Path.rename"])
async def test_g8_a_head_that_dies_while_it_makes_a_run_blocks_no_other(
    heads: Heads, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patches:
        patches.setattr(step, die)
        with pytest.raises(StorageError):
            await heads.head().create(REQUEST, KEY)
    assert known_runs(heads.folder) == []  # nobody drives half a run
    view, made = await heads.head().create(REQUEST, KEY)
    assert (made, known_runs(heads.folder)) == (True, [view.run_id])


async def test_examples_come_in_order_through_any_head(heads: Heads) -> None:
    one, two = heads.head(), heads.head()
    view, _ = await one.create(REQUEST)
    assert await one.append(view.run_id, body("a", "b"), 0) == 2
    assert await two.append(view.run_id, body("c"), 2) == 3
    assert await one.append(view.run_id, body("c"), 2) == 3
    with pytest.raises(UsageError, match="line 2: not JSON"):
        await one.append(view.run_id, body("d") + b"{", None)
    many = [runs.append(view.run_id, body(f"{n}"), None) for n in range(10) for runs in (one, two)]
    assert sorted(await asyncio.gather(*many)) == list(range(4, 24))
    closed = await two.close(view.run_id)
    assert (closed.closed, closed.examples) == (True, 23)
    assert await one.show(view.run_id) == closed
    with pytest.raises(ConflictError, match="is closed: it has 23 examples"):
        await one.append(view.run_id, body("e"), 23)


async def test_a_mix_is_closed_from_the_start_and_takes_nothing(heads: Heads) -> None:
    parts = MixPart(name="counted", size=3), MixPart(name="counted", size=4, seed=1)
    view, _ = await heads.head().create(REQUEST.model_copy(update={"environments": parts}))
    assert (view.closed, view.examples) == (True, 7)
    assert view.spec.input_fingerprint
    with pytest.raises(ConflictError, match="brings its own examples, and takes no others"):
        await heads.head().append(view.run_id, body("a"))
    assert (await heads.head().close(view.run_id)).examples == 7


async def test_a_view_adds_up_at_any_moment(heads: Heads) -> None:
    runs = heads.head()
    view, _ = await runs.create(REQUEST)
    await runs.append(view.run_id, body("a", "b"))
    await heads.take_up(view)
    groups = [group(0), group(1)]
    (ticket, _) = await heads.ledger.accept(view.run_id, 0, 2, groups)
    await heads.ledger.claim(ticket, "worker", 60.0)
    seen = await runs.show(view.run_id)
    assert (seen.accepted, seen.queued, seen.in_flight, seen.archived) == (4, 2, 2, 0)
    heads.write(view, Written(rollouts=ended(1), reward_mean=0.5, waiting_for="a version"))
    await heads.ledger.forget_run(view.run_id)
    await heads.take_up(view)  # a ledger that forgot all, and is fed again
    await heads.ledger.accept(view.run_id, 0, 1, [group(0, samples=(1,))])
    seen = await runs.show(view.run_id)
    assert (seen.accepted, seen.succeeded, seen.queued, seen.archived) == (2, 1, 1, 1)
    assert (seen.reward_mean, seen.waiting_for) == (0.5, "a version")
    heads.write(view, Written(state=RunState.ENDED, rollouts=ended(3, 1), examples=2))
    seen = await runs.show(view.run_id)
    assert (seen.state, seen.closed, seen.accepted, seen.queued) == (RunState.ENDED, True, 4, 0)
    assert seen.waiting_for is None


async def test_a_look_costs_one_question_to_the_ledger_and_none_when_all_is_over(heads: Heads) -> None:
    runs = heads.head()
    view, _ = await runs.create(REQUEST)
    await heads.take_up(view)
    asked: list[str] = []

    class Asked(MemoryLedger):
        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("_"):
                asked.append(name)
            return getattr(heads.ledger, name)

    runs._ledger = Asked()
    await runs.show(view.run_id)
    assert asked == ["run"]
    heads.write(view, Written(state=RunState.ENDED))
    asked.clear()
    before = await runs.show(view.run_id)
    (heads.folder / view.run_id / "rollouts.run" / progress.NAME).unlink()
    assert await runs.show(view.run_id) == before
    assert asked == []


async def test_pause_and_resume_hold_without_and_with_a_ledger_that_knows_the_run(heads: Heads) -> None:
    runs = heads.head()
    view, _ = await runs.create(REQUEST)
    assert (await runs.pause(view.run_id)).state is RunState.PAUSED
    assert (await heads.head().show(view.run_id)).state is RunState.PAUSED
    assert (await runs.resume(view.run_id)).state is RunState.OPEN
    await heads.take_up(view)
    for _ in range(2):
        assert (await runs.pause(view.run_id)).state is RunState.PAUSED
        status = await heads.ledger.run(view.run_id)
        assert status is not None
        assert status.state is RunState.PAUSED
    await heads.ledger.forget_run(view.run_id)  # a Redis that was flushed
    assert (await runs.show(view.run_id)).state is RunState.PAUSED
    await heads.take_up(view)
    assert (await runs.resume(view.run_id)).state is RunState.OPEN


async def test_cancelled_is_for_good_and_ends_what_is_open(heads: Heads) -> None:
    runs = heads.head()
    view, _ = await runs.create(REQUEST)
    await heads.take_up(view)
    await heads.ledger.accept(view.run_id, 0, 1, [group(0)])
    cancelled = await runs.cancel(view.run_id)
    assert (cancelled.state, cancelled.cancelled, cancelled.accepted) == (RunState.CANCELLED, 2, 2)
    assert await runs.cancel(view.run_id) == cancelled
    for steer in (runs.pause, runs.resume):
        with pytest.raises(ConflictError, match=f"run {view.run_id} is cancelled: that is for good"):
            await steer(view.run_id)
    with pytest.raises(ConflictError, match="is cancelled: it takes no more examples"):
        await runs.append(view.run_id, body("a"))


async def test_what_has_ended_stays_so_and_answers_a_repeated_append(heads: Heads) -> None:
    runs = heads.head()
    view, _ = await runs.create(REQUEST)
    await runs.append(view.run_id, body("a"), 0)
    heads.write(view, Written(state=RunState.ENDED, rollouts=ended(2)))
    assert (await runs.cancel(view.run_id)).state is RunState.ENDED
    assert await runs.append(view.run_id, body("a"), 0) == 1
    with pytest.raises(ConflictError, match="is ended: it takes no more examples"):
        await runs.append(view.run_id, body("b"), 1)
    with pytest.raises(ConflictError, match="is ended: that is for good"):
        await runs.pause(view.run_id)


async def test_a_list_has_the_newest_first_and_one_state_if_asked(heads: Heads) -> None:
    runs = heads.head()
    assert await runs.list() == []
    views = [(await runs.create(REQUEST))[0] for _ in range(5)]
    names = sorted((view.run_id for view in views), reverse=True)
    assert [view.run_id for view in await runs.list()] == names
    assert [view.run_id for view in await runs.list(limit=2)] == names[:2]
    await runs.pause(names[3])
    assert [view.run_id for view in await heads.head().list(RunState.PAUSED)] == [names[3]]


@pytest.mark.parametrize("name", ["20260101-000000-00000000", "..", "../keys", "", ".keys", "run-1\x00"])
async def test_a_run_that_is_not_there_is_said_so(heads: Heads, name: str) -> None:
    runs = heads.head()
    await runs.create(REQUEST, KEY)
    calls = runs.show, runs.close, runs.cancel, runs.pause, runs.resume
    for call in calls:
        with pytest.raises(UnknownRunError, match="there is no run "):
            await call(name)
    with pytest.raises(UnknownRunError):
        await runs.append(name, body("a"))


async def test_the_leader_of_this_process_is_told(heads: Heads) -> None:
    runs = heads.head()
    for steer in (lambda: runs.create(REQUEST, KEY), lambda: runs.pause(known_runs(heads.folder)[0])):
        runs.changed.clear()
        await steer()
        assert runs.changed.is_set()


async def test_the_manifest_says_what_was_asked(heads: Heads) -> None:
    view, _ = await heads.head().create(REQUEST)
    content = json.loads((heads.folder / view.run_id / "rollouts.run" / "manifest.json").read_text())
    assert content["request"]["model"] == "stub:"
    assert content["spec"]["run_id"] == view.run_id
