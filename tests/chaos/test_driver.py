"""The driver itself: it draws the same from the same seed, and its checks see what is wrong."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.records import FailureClass
from tests.chaos import checks, workload
from tests.chaos.faults import FAULTS, Fault, Recipe, draw
from tests.chaos.processes import Death
from tests.chaos.workload import Workload

if TYPE_CHECKING:
    from pathlib import Path

RECIPES = [Recipe("kill", ("gpu1", "gpu2"), 5.0), Recipe("freeze", ("redis",), 20.0, (1.0, 2.0), at_most=2)]
ROWS = Workload(({"reward": 0.5}, {"reward": 1.0}), ("instant", "raises"), samples=2)


def row(example: int, sample: int, **said: Any) -> checks.Row:
    place = {"example_index": example, "sample_index": sample, "rollout_id": f"run.{example}.{sample}"}
    return place | {"state": "succeeded", "reward": ROWS.rows[example]["reward"]} | said


def failure(example: int, sample: int) -> checks.Row:
    return row(example, sample, state="failed") | {"class": FailureClass.ENVIRONMENT}


SUCCEEDED = [row(0, 0), row(0, 1)]
FAILED = [failure(1, 0), failure(1, 1)]
METRICS: dict[str, Any] = {
    "complete": True,
    "rollouts": {"accepted": 4, "ended": 4, "succeeded": 2, "failed": 2, "cancelled": 0},
    "failures_by_class": {"environment": 2},
    "reward": {"count": 2, "mean": 0.5},
}


def test_a_seed_gives_the_same_schedule_and_another_seed_another_one() -> None:
    schedule = draw(7, RECIPES, 100.0)
    assert draw(7, RECIPES, 100.0) == schedule
    assert draw(8, RECIPES, 100.0) != schedule
    assert list(schedule) == sorted(schedule)
    kills = [fault.at for fault in schedule if fault.what == "kill"]
    gaps = [later - earlier for earlier, later in zip([0.0, *kills], kills, strict=False)]
    assert all(2.5 <= round(gap, 1) <= 7.5 for gap in gaps)
    assert 13 <= len(kills) <= 40
    assert sum(fault.what == "freeze" for fault in schedule) == 2
    assert {fault.target for fault in schedule} == {"gpu1", "gpu2", "redis"}
    assert {fault.what for fault in schedule} <= set(FAULTS)


def test_a_recipe_that_changes_leaves_the_others_as_they_were() -> None:
    kills = [fault for fault in draw(7, RECIPES, 100.0) if fault.what == "kill"]
    assert list(draw(7, RECIPES[:1], 100.0)) == kills


def test_a_fault_is_shown_whole() -> None:
    assert str(Fault(12.5, "freeze", "gpu1", 3.0)) == "  12.50  freeze gpu1 for 3.0 s"


def test_a_seed_gives_the_same_rollouts_of_all_kinds() -> None:
    rows = workload.mixed(3, 200, 2)
    assert rows == workload.mixed(3, 200, 2)
    assert rows != workload.mixed(4, 200, 2)
    assert (len(rows.rows), rows.total) == (200, 400)
    assert set(rows.kinds) == {*workload.MIXED, "sleeps"}
    sleeps = [row["sleep"] for row in workload.draw(1, {"sleeps": 2000}).rows]
    assert 0.01 <= min(sleeps) < 0.1
    assert 1.5 < max(sleeps) <= 2.0


def test_all_is_well_where_all_is_well() -> None:
    assert checks.each_once(SUCCEEDED, FAILED, ROWS) == []
    assert checks.endings([*SUCCEEDED, *FAILED], ROWS) == []
    assert checks.metrics(METRICS, SUCCEEDED, FAILED) == []


@pytest.mark.parametrize(
    ("succeeded", "failed", "complaint"),
    [
        (SUCCEEDED[:1], FAILED, "1 rollouts are missing: (0, 1)"),
        ([*SUCCEEDED, row(0, 1)], FAILED, "1 rollouts have more than one row: (0, 1)"),
        (SUCCEEDED, [*FAILED, failure(1, 2)], "1 rollouts that nobody asked for: (1, 2)"),
        (SUCCEEDED[::-1], FAILED, "the rows are not in the order of the input"),
        (SUCCEEDED, FAILED[::-1], "the failures are not in the order of the input"),
        ([row(0, 0, rollout_id="run.0.1"), row(0, 1)], FAILED, "rollout_id is not one to one"),
    ],
)
def test_rows_that_are_missing_twice_or_invented_are_seen(
    succeeded: list[checks.Row], failed: list[checks.Row], complaint: str
) -> None:
    [said] = checks.each_once(succeeded, failed, ROWS)
    assert said.startswith(complaint)


def test_wrong_endings_are_seen() -> None:
    wrong = [row(0, 0, reward=1.0), row(1, 0), failure(0, 1)]
    assert len(checks.endings(wrong, ROWS)) == 3
    assert len(checks.endings(wrong, ROWS, also=[("failed", FailureClass.ENVIRONMENT)])) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"complete": False},
        {"rollouts": METRICS["rollouts"] | {"accepted": 5}},
        {"failures_by_class": {"environment": 1}},
        {"reward": {"count": 1, "mean": 0.5}},
        {"reward": {"count": 2, "mean": 0.6}},
        {"reward": {"count": 2, "mean": None}},
    ],
)
def test_counters_that_do_not_add_up_are_seen(change: dict[str, Any]) -> None:
    assert len(checks.metrics(METRICS | change, SUCCEEDED, FAILED)) == 1


def test_deaths_that_nobody_asked_for_are_seen() -> None:
    asked = Death(1.0, "gpu1", 100, -9, asked=True)
    own = dataclasses.replace(asked, asked=False)
    assert checks.deaths([asked]) == []
    assert checks.deaths([asked, own]) == [
        "1 processes ended that nobody had touched: gpu1 [100] ended with SIGKILL"
    ]
    assert checks.deaths([own], poison=True) == []
    assert checks.deaths([dataclasses.replace(own, name="beat")], poison=True)


def test_keys_without_an_expiry_are_seen_but_for_those_of_kombu() -> None:
    assert checks.keys([("_kombu.binding.gym_queue", -1), ("gq:tombstone", 1000)]) == []
    assert checks.keys([("gq:runs", -1)]) == ["1 keys are left without an expiry: gq:runs"]


def test_a_torn_line_is_seen(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(ValueError, match="Expecting"):
        checks.read(tmp_path / "out.jsonl")


def test_what_is_said_too_often_and_tracebacks_are_seen() -> None:
    waiting = "".join(f"2026-01-01 10:00:{second} WARNING gpu[7] broker: away\n" for second in range(60))
    traceback = (
        "INFO all is well\nTraceback (most recent call last):\n  File x\n    y\nValueError: no\nINFO more\n"
    )
    assert checks.logs({"gpu1": waiting[:1000] + "INFO well\n" * 100, "beat": ""}) == []
    assert checks.logs({"gpu1": waiting}) == ["gpu1 says 60 times: WARNING gpu[7] broker: away"]
    assert checks.logs({"gpu1": traceback}) == ["gpu1 has 1 tracebacks, such as: ValueError: no"]
