"""When a group is decided, what is written of it, and that a crash changes nothing about it."""

from __future__ import annotations

import errno
import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gym_queue.api import GroupCounts
from gym_queue.coordinator.archive import Archive, Place
from gym_queue.coordinator.groups import Groups, OpenGroup, Sample, judge
from gym_queue.errors import DiskFullError, UsageError
from gym_queue.records import FailureClass, Freshness, GroupPolicy
from tests.unit.output_rows import ended
from tests.unit.road import run_spec

if TYPE_CHECKING:
    from pathlib import Path

    from gym_queue.ledger.base import Event

SAMPLES = 4


def samples(*rewards: float | None, version: int | None = None) -> list[Sample]:
    return [Sample(Place(0, 10 * number, 9), reward, version) for number, reward in enumerate(rewards)]


@pytest.mark.parametrize(
    ("group", "policy", "outcome"),
    [
        (OpenGroup(samples(1, 0, 1)), {}, None),
        (OpenGroup(samples(1, 0, 1, 0)), {}, "complete"),
        (OpenGroup(samples(1, 0), others=1), {}, "short"),
        (OpenGroup(samples(1, 0)), {"usable": 2}, "complete"),
        (OpenGroup(samples(1), others=2), {"usable": 2}, None),
        (OpenGroup(samples(1), others=3), {"usable": 2}, "short"),
        (OpenGroup(samples(1), others=3, stale=1), {"usable": 2}, "stale"),
        (OpenGroup(samples(), others=4, stale=1), {"usable": 2}, "short"),
        (OpenGroup(samples(1, 1, 0)), {"usable": 2, "drop_uniform": True}, "uniform"),
        (OpenGroup(samples(1, 0, 0)), {"usable": 2, "drop_uniform": True}, "complete"),
        (OpenGroup(samples(1, 1, 1, 1)), {"drop_uniform": True}, "uniform"),
        (OpenGroup(samples(1, 1, 1, 1)), {}, "complete"),
        (OpenGroup(samples(None, None)), {"usable": 2, "drop_uniform": True}, "uniform"),
    ],
)
def test_how_a_group_is_decided(group: OpenGroup, policy: dict[str, Any], outcome: str | None) -> None:
    assert judge(group, GroupPolicy(**policy), SAMPLES, None) == outcome


def test_a_group_is_as_old_as_the_oldest_token_of_those_samples_that_count() -> None:
    policy = GroupPolicy(usable=2)
    group = OpenGroup(samples(1, version=5) + samples(0, version=3) + samples(0, version=1))
    assert judge(group, policy, SAMPLES, 3) == "complete"
    assert judge(group, policy, SAMPLES, 4) == "stale"
    assert judge(OpenGroup(samples(1, 0)), policy, SAMPLES, 4) == "complete", "nobody knows how old it is"


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ({"usable": 5}, "5 usable samples of a group are not possible: it has 4"),
        ({"usable": 1, "drop_uniform": True}, "groups of one usable sample have equal rewards"),
    ],
)
def test_what_no_group_can_fulfil_is_refused(tmp_path: Path, policy: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        Groups(run_spec(samples=SAMPLES, groups=policy), tmp_path)


class Files:
    """A run's archive and groups, which may be closed and opened again."""

    def __init__(self, folder: Path, **spec: Any) -> None:
        self.out = folder / "rollouts.jsonl"
        self.spec = run_spec(samples=SAMPLES, **spec)
        self.open()

    def open(self) -> None:
        self.archive = Archive(self.out, SAMPLES).open(resume=True)
        self.groups = Groups(self.spec, self.archive.paths.run_dir).open(self.archive)

    def close(self) -> None:
        self.groups.close()
        self.archive.close()

    def take(self, *events: Event, store: bool = True) -> None:
        self.groups.add(self.archive.append(events))
        if store:
            self.groups.store()

    @property
    def log(self) -> list[dict[str, Any]]:
        return [
            json.loads(line)
            for line in (self.archive.paths.run_dir / "groups.jsonl").read_text().splitlines()
        ]

    def rows(self, line: dict[str, Any]) -> list[bytes]:
        """Return the rows that a line of the log names."""
        files = [self.out.read_bytes(), self.archive.paths.failures.read_bytes()]
        return [files[which][offset : offset + length] for which, offset, length in line["rows"]]


def test_a_group_is_complete_with_exactly_the_first_samples_that_succeeded(tmp_path: Path) -> None:
    files = Files(tmp_path, groups={"usable": 2})
    first, second = ended(3, 2, version=7), ended(3, 0, version=6, padding="ü" * 99)
    files.take(ended(3, 1, state="failed"), first, ended(1, 0))
    assert files.log == []
    files.take(second, ended(3, 3, version=1))
    (line,) = files.log
    assert files.rows(line) == [first.row, second.row]
    assert {name: line[name] for name in ("run_id", "example_id", "example_index", "outcome")} == {
        "run_id": "run-1",
        "example_id": "example-3",
        "example_index": 3,
        "outcome": "complete",
    }
    assert line["weight_version"] == 6
    assert files.groups.counts == GroupCounts(complete=1)
    files.close()


def test_stragglers_are_named_until_their_rows_are_there(tmp_path: Path) -> None:
    files = Files(tmp_path, groups={"usable": 2})
    files.take(ended(0, 0), ended(0, 1), *(ended(1, number, state="failed") for number in range(3)))
    assert files.groups.stragglers == {0: "its group has 2 of 4", 1: "its group cannot have 2 of 4 any more"}
    files.take(ended(0, 2, state="cancelled"), ended(1, 3, state="cancelled"))
    assert list(files.groups.stragglers) == [0]
    files.close()
    files.open()
    assert files.groups.stragglers == {0: "its group has 2 of 4"}, "who comes next ends them too"
    files.take(ended(0, 3))
    assert files.groups.stragglers == {}
    assert [line["example_index"] for line in files.log] == [0, 1], "what comes late decides nothing"
    files.close()


def test_where_nobody_asks_for_groups_no_sample_is_ended_for_one(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.take(ended(0, 0, state="failed"))
    assert (files.groups.counts.short, files.groups.stragglers) == (1, {})
    files.close()
    files.open()
    assert files.groups.stragglers == {}
    files.close()


def test_no_more_groups_are_complete_than_are_wanted(tmp_path: Path) -> None:
    files = Files(tmp_path, groups={"usable": 1, "wanted": 2, "oversample": 2})
    assert files.groups.allowance() == 4
    files.take(*(ended(number, 0) for number in (5, 3, 4)))
    assert files.groups.enough
    assert [line["example_index"] for line in files.log] == [5, 3]
    assert files.groups.allowance() == 0
    files.take(ended(4, 1), ended(1, 1))
    assert files.groups._open == {}, "nothing more needs to be remembered"
    files.close()
    files.open()
    files.groups.settle()
    files.groups.store()
    assert (len(files.log), files.groups.enough) == (2, True)
    files.close()


@pytest.mark.guarantee("G3")
def test_groups_that_were_not_written_when_their_coordinator_died_are_decided_by_the_next(
    tmp_path: Path,
) -> None:
    files = Files(tmp_path, groups={"usable": 2}, freshness=Freshness(max_staleness=0, groups_per_version=1))
    events = [ended(0, 3, version=4), ended(0, 1, version=4), ended(0, 0), ended(1, 2, version=2)]
    files.take(*events, store=False)
    files.close()
    files.open()
    files.groups.version = 3
    files.groups.settle()
    files.groups.store()
    (line,) = files.log
    assert (files.rows(line), line["weight_version"]) == ([event.row for event in events[:2]], 4)
    files.take(ended(1, 3, version=4))
    assert files.log[1]["outcome"] == "stale", "what was sampled before the death counts, with its version"
    files.close()


def test_a_torn_line_is_cut_off_and_its_group_decided_again(tmp_path: Path) -> None:
    files = Files(tmp_path, groups={"usable": 1})
    files.take(ended(0, 0), ended(1, 0))
    files.close()
    log = files.archive.paths.run_dir / "groups.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-20])
    files.open()
    assert "torn line" in files.groups.notes[0]
    files.groups.settle()
    files.groups.store()
    assert log.read_bytes() == whole
    files.close()
    log.write_bytes(b'{"run_id": "x"}\n' + whole)
    with pytest.raises(UsageError, match="line 1 is not a group of this run: example_id: Field required"):
        files.open()
    files.archive.close()


def test_a_disk_that_is_full_forgets_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(tmp_path, groups={"usable": 1})
    files.take(ended(0, 0))

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.groups.add(files.archive.append([ended(1, 0)]))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", no_space)
        with pytest.raises(DiskFullError, match=r"groups.jsonl cannot be written: No space left"):
            files.groups.store()
    assert len(files.log) == 1
    assert files.groups.length == (files.archive.paths.run_dir / "groups.jsonl").stat().st_size
    files.groups.store()
    assert [line["example_index"] for line in files.log] == [0, 1]
    files.close()


def test_the_first_version_is_the_one_with_which_the_run_began_whoever_goes_on(tmp_path: Path) -> None:
    files = Files(tmp_path, freshness=Freshness(max_staleness=1, groups_per_version=2))
    files.groups.version = 3
    files.groups.store()
    assert files.groups.allowance() == 4
    files.groups.version = 4
    assert files.groups.allowance() == 6
    files.close()
    files.open()
    files.groups.version = 5
    files.groups.store()
    assert (files.groups.versions, files.groups.allowance()) == (2, 8)
    files.close()
    (files.archive.paths.run_dir / "first_version").write_text("?")
    files.open()
    with pytest.raises(UsageError, match="should hold the number of a version"):
        files.groups.store()
    files.close()


def test_a_very_long_id_is_found(tmp_path: Path) -> None:
    files = Files(tmp_path, groups={"usable": 1})
    event = ended(0, 0)
    long = "ü" * 5000
    files.take(event.model_copy(update={"row": event.row.replace(b"example-0", long.encode())}))
    assert files.log[0]["example_id"] == long
    files.close()


ROLLOUTS = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.integers(0, SAMPLES - 1),
        st.sampled_from(["succeeded", "succeeded", "succeeded", "failed", "stale", "cancelled"]),
        st.sampled_from([0.0, 1.0]),
    ),
    unique_by=lambda rollout: rollout[:2],
)


@given(
    ROLLOUTS,
    st.lists(st.integers(0, 20), max_size=4),
    st.builds(
        GroupPolicy,
        usable=st.sampled_from([None, 2, 3]),
        drop_uniform=st.booleans(),
        wanted=st.sampled_from([None, None, 1, 3]),
    ),
)
def test_whoever_dies_when_the_same_groups_are_decided_each_once(
    tmp_path_factory: pytest.TempPathFactory,
    rollouts: list[tuple[int, int, str, float]],
    deaths: list[int],
    policy: GroupPolicy,
) -> None:
    """One coordinator lives, another dies after some rollouts, before it has written what it decided."""
    lucky = Files(tmp_path_factory.mktemp("lucky"), groups=policy)
    unlucky = Files(tmp_path_factory.mktemp("unlucky"), groups=policy)
    for number, (example, sample, fate, reward) in enumerate(rollouts):
        state: Any = "failed" if fate == "stale" else fate
        failure = FailureClass.STALE if fate == "stale" else FailureClass.MODEL
        event = ended(example, sample, state=state, reward=reward, failure_class=failure)
        lucky.take(event)
        unlucky.take(event, store=number not in deaths)
        if number in deaths:
            unlucky.close()
            unlucky.open()
            unlucky.groups.settle()
            unlucky.groups.store()
    assert unlucky.log == lucky.log
    decided = [line["example_index"] for line in lucky.log]
    assert len(decided) == len(set(decided))
    assert lucky.groups.stragglers == unlucky.groups.stragglers
    for line in lucky.log:
        if line["outcome"] == "complete":
            rows = [json.loads(row) for row in lucky.rows(line)]
            assert [row["state"] for row in rows] == ["succeeded"] * (policy.usable or SAMPLES)
            assert {row["example_index"] for row in rows} == {line["example_index"]}
    lucky.close()
    unlucky.close()
