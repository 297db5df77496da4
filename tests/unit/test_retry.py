"""``--retry``: failed rollouts leave the failures file all at once, and are then simply not done (G9)."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gym_queue.coordinator.archive import Archive, paths
from gym_queue.coordinator.rows import CANCELLED, withdraw
from gym_queue.errors import DiskFullError, UsageError
from gym_queue.records import FailureClass
from tests.unit.output_rows import ended, places

if TYPE_CHECKING:
    from gym_queue.ledger.base import Event
    from gym_queue.records import Summary

INFRASTRUCTURE, TIMEOUT = FailureClass.INFRASTRUCTURE, FailureClass.TIMEOUT


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Output with a success, two failures of different classes and a cancelled rollout."""
    out = tmp_path / "out.jsonl"
    with Archive(out, samples=1).open() as archive:
        archive.append(
            [
                ended(0, 0),
                ended(1, 0, state="failed", failure_class=INFRASTRUCTURE),
                ended(2, 0, state="failed", failure_class=TIMEOUT),
                ended(3, 0, state="cancelled"),
            ]
        )
    return out


@pytest.mark.parametrize(
    ("classes", "again"),
    [((INFRASTRUCTURE,), [1]), ((TIMEOUT, CANCELLED), [2, 3]), ((FailureClass.MODEL,), []), ((), [])],
)
def test_rows_of_the_classes_asked_for_count_as_not_done(
    out: Path, classes: tuple[str, ...], again: list[int]
) -> None:
    kept: list[Summary] = []
    with Archive(out, samples=1).open(resume=True, retry=classes, on_row=kept.append) as archive:
        assert [index for index in range(4) if not archive.done_samples(index)] == again
        assert archive.count == len(kept) == 4 - len(again)
        new = [ended(index, 0, reward=0.5) for index in again]
        assert archive.append([*new, ended(0, 0)]) == new
        archive.finalize()
    assert places(out) == [(0, 0), *((index, 0) for index in again)]
    assert places(paths(out).failures) == [(index, 0) for index in (1, 2, 3) if index not in again]


def test_what_is_done_again_is_told(out: Path) -> None:
    with Archive(out, samples=1).open(resume=True, retry=(INFRASTRUCTURE, CANCELLED)) as archive:
        assert archive.notes == [
            f"2 rollouts of {paths(out).failures} are done again: 1 cancelled, 1 infrastructure"
        ]
    with Archive(out, samples=1).open(resume=True, retry=(INFRASTRUCTURE,)) as archive:
        assert archive.notes == []


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_crash_on_the_way_leaves_the_file_as_it_was(
    out: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Old file or new file, nothing between: a row that is gone is to be done, one that is there is done."""
    failures = paths(out).failures
    before = failures.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if failing == "write":
            patch.setattr("gym_queue.coordinator.rows._class_of", full)
        else:
            patch.setattr(*{"fsync": (os, "fsync", full), "replace": (Path, "replace", full)}[failing])
        with pytest.raises(DiskFullError, match="cannot be rewritten: No space left"):
            withdraw(failures, [TIMEOUT])
    assert failures.read_bytes() == before
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "out.failures.jsonl",
        "out.jsonl",
        "out.run",
    ]


def test_nobody_takes_rows_out_under_a_writer(out: Path) -> None:
    failures = paths(out).failures
    before = failures.read_bytes()
    with Archive(out, samples=1).open(resume=True):
        with pytest.raises(UsageError, match="another process is writing"):
            Archive(out, samples=1).open(resume=True, retry=(TIMEOUT,))
        assert failures.read_bytes() == before


def test_a_torn_or_strange_line_is_left_to_the_reader(out: Path) -> None:
    failures = paths(out).failures
    strange: Event = ended(4, 0, state="failed", failure_class=TIMEOUT)
    with failures.open("ab") as file:
        file.write(strange.row)  # without its line end: torn
    with Archive(out, samples=1).open(resume=True, retry=(TIMEOUT,)) as archive:
        assert any("ended in a torn line" in note for note in archive.notes)
        assert (archive.done_samples(2), archive.done_samples(4)) == ([], [])
    failures.write_bytes(b"no row\n" + failures.read_bytes())
    with pytest.raises(UsageError, match="line 1 is not a rollout"):
        Archive(out, samples=1).open(resume=True, retry=(INFRASTRUCTURE,))
