from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gym_queue.coordinator.archive import Archive, is_being_written, paths
from gym_queue.coordinator.rows import read_summary
from gym_queue.errors import StorageError, UsageError
from gym_queue.output import FailedRow, SucceededRow
from tests.unit.output_rows import ended, places

if TYPE_CHECKING:
    from gym_queue.records import Summary


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "out.jsonl"


def test_paths_are_derived_from_the_output_file() -> None:
    assert paths(Path("runs/demo/rollouts.jsonl")) == (
        Path("runs/demo/rollouts.jsonl"),
        Path("runs/demo/rollouts.failures.jsonl"),
        Path("runs/demo/rollouts.metrics.json"),
        Path("runs/demo/rollouts.run"),
    )
    assert paths(Path("rows.json")).failures == Path("rows.json.failures.jsonl")
    with pytest.raises(UsageError, match="not a file name"):
        paths(Path("/"))


def test_rows_go_by_state_into_two_files_byte_for_byte(out: Path) -> None:
    events = [ended(0, 0), ended(0, 1, state="failed"), ended(1, 0, state="cancelled"), ended(1, 1)]
    with Archive(out, samples=2).open() as archive:
        assert archive.append(events) == events
        assert archive.count == 4
        files = archive.paths
    assert files.rows.read_bytes() == events[0].row + b"\n" + events[3].row + b"\n"
    assert files.failures.read_bytes() == events[1].row + b"\n" + events[2].row + b"\n"
    succeeded = [SucceededRow.model_validate_json(line) for line in files.rows.read_bytes().splitlines()]
    failed, cancelled = (
        FailedRow.model_validate_json(row) for row in files.failures.read_bytes().splitlines()
    )
    assert [row.reward for row in succeeded] == [1.0, 1.0]
    assert (failed.failure_class, failed.stage, failed.error) == ("timeout", "generate", "too slow")
    assert (cancelled.failure_class, cancelled.stage, cancelled.error) == (None, None, None)


@pytest.mark.guarantee("G1")
def test_duplicates_are_counted_and_not_written(out: Path) -> None:
    with Archive(out, samples=2).open() as archive:
        first, second = ended(3, 1), ended(3, 0, state="failed")
        again = ended(3, 1, reward=0.5)
        assert archive.append([first, again, second]) == [first, second]
        assert archive.append([second, ended(3, 1, reward=0.0)]) == []
        assert archive.duplicates == 3
        assert archive.count == 2
        assert archive.done_samples(3) == [0, 1]
        assert archive.done_samples(2) == archive.done_samples(1000) == []
        assert archive.is_done(7)
        assert not archive.is_done(8)
    assert out.read_bytes() == first.row + b"\n"


def test_existing_output_is_refused_without_resume(out: Path) -> None:
    with Archive(out, samples=1).open() as archive:
        archive.append([ended(0, 0, state="failed")])
    with pytest.raises(UsageError, match=r"failures\.jsonl exists already; .*--resume"):
        Archive(out, samples=1).open()
    with Archive(out, samples=1).open(resume=True) as archive:
        assert archive.done_samples(0) == [0]


def test_files_of_a_start_that_came_to_nothing_are_no_output(out: Path) -> None:
    Archive(out, samples=1).open().close()
    assert out.exists()
    Archive(out, samples=1).open().close()


def test_a_second_writer_is_refused(out: Path) -> None:
    with (
        Archive(out, samples=1).open(),
        pytest.raises(UsageError, match="another process is writing"),
    ):
        Archive(out, samples=1).open(resume=True)
    Archive(out, samples=1).open(resume=True).close()


def test_whether_it_is_being_written_is_seen_from_outside(out: Path) -> None:
    run_dir = paths(out).run_dir
    assert is_being_written(run_dir) is False
    with Archive(out, samples=1).open():
        assert is_being_written(run_dir) is True
        assert is_being_written(run_dir) is True, "looking takes no lock away"
    assert is_being_written(run_dir) is False
    Archive(out, samples=1).open(resume=True).close()


_CALL = {errno.EACCES: "open", errno.ENOLCK: "flock"}


@pytest.mark.parametrize("code", _CALL)
def test_where_no_lock_can_be_seen_nothing_is_said(
    out: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, "no")

    Archive(out, samples=1).open().close()
    monkeypatch.setattr(os if code == errno.EACCES else fcntl, _CALL[code], refuse)
    assert is_being_written(paths(out).run_dir) is None


def test_resume_gives_back_the_summaries_with_examples_close_together(out: Path) -> None:
    events = [
        ended(
            example, sample, state="failed" if sample else "succeeded", metrics={} if sample else {"f1": 0.5}
        )
        for example in range(20)
        for sample in range(2)
    ]
    with Archive(out, samples=2).open() as archive:
        archive.append(events)
    seen: list[Summary] = []
    with Archive(out, samples=2).open(resume=True, on_row=seen.append) as archive:
        assert archive.count == 40
        assert archive.append(events) == []
    assert seen == [event.summary for event in events]


def test_numbers_that_json_cannot_say_come_back_as_absent() -> None:
    summary = read_summary(ended(0, 0, reward=float("nan"), metrics={"f1": float("inf"), "n": 2.0}).row)
    assert summary.reward is None
    assert summary.metrics == {"n": 2.0}


@pytest.mark.guarantee("G9")
@pytest.mark.parametrize("tail", [b'{"run_id": "ru', b'{"run_id": "ru\n', b"\0\0\0", b"\n"])
def test_a_torn_last_line_is_cut_off(out: Path, tail: bytes) -> None:
    with Archive(out, samples=1).open() as archive:
        archive.append([ended(0, 0), ended(1, 0)])
    whole = out.read_bytes()
    with out.open("ab") as file:
        file.write(tail)
    with Archive(out, samples=1).open(resume=True) as archive:
        assert archive.notes == [f"{out} ended in a torn line; it is cut off and its rollout done again"]
        assert out.read_bytes() == whole
        archive.append([ended(2, 0)])
    assert places(out) == [(0, 0), (1, 0), (2, 0)]


def test_a_row_without_line_end_is_torn(out: Path) -> None:
    out.parent.mkdir()
    out.write_bytes(ended(0, 0).row)
    with Archive(out, samples=1).open(resume=True) as archive:
        assert archive.count == 0
    assert out.read_bytes() == b""


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"run_id": "ru\n' + ended(0, 0).row + b"\n", r"line 1 is not a rollout .*Invalid JSON"),
        (ended(0, 0).row + b"\n\n" + ended(1, 0).row + b"\n", r"line 2 is not a rollout"),
        (ended(0, 0).row + ended(1, 0).row + b"\n" + ended(2, 0).row + b"\n", r"line 1 is not a rollout"),
        (b'{"prompt": "not ours"}\n', r"line 1 is not a rollout of this run: example_index: Field required"),
        (ended(0, 1).row + b"\n", r"line 1 is not a rollout of this run: example 0 has 1 samples, no 1"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_changed(out: Path, content: bytes, sentence: str) -> None:
    out.parent.mkdir()
    out.write_bytes(content)
    with pytest.raises(UsageError, match=sentence):
        Archive(out, samples=1).open(resume=True)
    assert out.read_bytes() == content


def test_repeated_rows_are_told_and_gone_at_the_end(out: Path) -> None:
    out.parent.mkdir()
    first, repeat = ended(0, 0, reward=1.0), ended(0, 0, reward=0.0)
    out.write_bytes(b"".join(event.row + b"\n" for event in (first, repeat, ended(1, 0))))
    paths(out).failures.write_bytes(ended(1, 0, state="failed").row + b"\n")
    rewards: list[float | None] = []
    archive = Archive(out, samples=1).open(resume=True, on_row=lambda summary: rewards.append(summary.reward))
    assert "have 2 rows of rollouts they hold already" in archive.notes[0]
    assert rewards == [1.0, 1.0]
    archive.finalize()
    assert out.read_bytes() == first.row + b"\n" + ended(1, 0).row + b"\n"
    assert paths(out).failures.read_bytes() == b""


def test_finalize_puts_rows_into_the_order_of_the_input(out: Path) -> None:
    archive = Archive(out, samples=3).open()
    archive.append([ended(2, 1), ended(0, 2, padding="x" * 100_000), ended(1, 1, state="failed")])
    archive.append([ended(0, 0), ended(0, 1, state="failed"), ended(2, 0)])
    archive.finalize()
    assert places(out) == [(0, 0), (0, 2), (2, 0), (2, 1)]
    assert places(paths(out).failures) == [(0, 1), (1, 1)]
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "out.failures.jsonl",
        "out.jsonl",
        "out.run",
    ]


def test_finalize_leaves_an_ordered_file_alone(out: Path) -> None:
    archive = Archive(out, samples=1).open()
    archive.append([ended(0, 0), ended(4, 0)])
    before = out.stat().st_ino
    archive.finalize()
    assert out.stat().st_ino == before


def test_a_link_stays_a_link_to_the_ordered_file(out: Path, tmp_path: Path) -> None:
    out.parent.mkdir()
    out.symlink_to(tmp_path / "elsewhere.jsonl")
    archive = Archive(out, samples=1).open()
    archive.append([ended(1, 0), ended(0, 0)])
    archive.finalize()
    assert out.is_symlink()
    assert places(tmp_path / "elsewhere.jsonl") == [(0, 0), (1, 0)]


def test_no_place_to_write_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"out\.jsonl cannot be opened: Not a directory"):
        Archive(tmp_path / "file" / "out.jsonl", samples=1).open()


def test_rows_that_would_break_the_file_are_refused(out: Path) -> None:
    with Archive(out, samples=1).open() as archive:
        with pytest.raises(ValueError, match="example 0 has 1 samples"):
            archive.append([ended(0, 1)])
        with pytest.raises(ValueError, match="line break"):
            archive.append([ended(0, 0).model_copy(update={"row": b"{\n}"})])
    assert out.read_bytes() == b""
