"""The archive when the disk is full, the process dies, or anything happens in any order."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gym_queue.coordinator.archive import Archive, paths
from gym_queue.errors import DiskFullError, StorageError
from gym_queue.output import RolloutRow
from tests.unit.output_rows import State, ended, places

ROOT = Path(__file__).parents[2]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "out.jsonl"


def test_a_full_disk_while_ordering_keeps_the_unordered_file(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = Archive(out, samples=1).open()
    archive.append([ended(1, 0), ended(0, 0)])

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(
        StorageError, match=r"stays complete, but in order of arrival.*No space left on device"
    ):
        archive.finalize()
    assert places(out) == [(1, 0), (0, 0)]
    assert not list(out.parent.glob("*.tmp"))


@pytest.mark.guarantee("G1")
@pytest.mark.parametrize("failing", ["write", "fdatasync"])
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_batch_that_cannot_be_stored_leaves_no_trace(
    out: Path, monkeypatch: pytest.MonkeyPatch, failing: str, reason: int
) -> None:
    with Archive(out, samples=2).open() as archive:
        archive.append([ended(0, 0), ended(0, 1, state="failed")])
        before = out.read_bytes(), archive.paths.failures.read_bytes()
        batch = [ended(1, 0), ended(1, 1, state="failed"), ended(0, 0)]
        real = getattr(os, failing)
        calls = 0

        def second_call_fails(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise OSError(reason, os.strerror(reason))
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, failing, second_call_fails)
            waiting_helps = DiskFullError if reason != errno.EIO else StorageError
            with pytest.raises(StorageError) as caught:
                archive.append(batch)
        assert type(caught.value) is waiting_helps
        assert str(caught.value) == f"{archive.paths.failures} cannot be written: {os.strerror(reason)}"
        assert (out.read_bytes(), archive.paths.failures.read_bytes()) == before
        assert (archive.count, archive.duplicates, archive.done_samples(1)) == (2, 0, [])
        assert archive.append(batch) == batch[:2]
    assert places(out) == [(0, 0), (1, 0)]
    assert places(paths(out).failures) == [(0, 1), (1, 1)]


def test_an_end_that_cannot_be_cut_off_at_once_is_cut_off_later(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Archive(out, samples=1).open() as archive:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", broken)
            patch.setattr(os, "ftruncate", broken)
            with pytest.raises(StorageError, match="torn end cannot be cut off"):
                archive.append([ended(0, 0)])
        archive.append([ended(1, 0)])
    assert places(out) == [(1, 0)]


def test_an_interrupt_in_the_middle_of_a_write_leaves_no_trace(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    archive = Archive(out, samples=1).open()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            archive.append([ended(0, 0)])
    archive.append([ended(1, 0)])
    archive.finalize()
    assert places(out) == [(1, 0)]


LIMITED = """
import resource, sys
from pathlib import Path
from gym_queue.coordinator.archive import Archive
from gym_queue.errors import StorageError
from tests.unit.output_rows import ended

with Archive(Path(sys.argv[1]), samples=1).open() as archive:
    archive.append([ended(0, 0)])
    kept = archive.paths.rows.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (kept + 700, kept + 700))
    try:
        archive.append([ended(example, 0) for example in range(1, 9)])
    except StorageError as error:
        print(error)
    print(archive.paths.rows.stat().st_size - kept, archive.count)
"""

KILLED = """
import os, signal, sys
from pathlib import Path
from gym_queue.coordinator import archive as module
from tests.unit.output_rows import ended

archive = module.Archive(Path(sys.argv[1]), samples=1).open()
archive.append([ended(0, 0), ended(1, 0, state="failed")])
real = os.write

def torn(descriptor, data):
    real(descriptor, data[: 3 * len(data) // 4])
    os.kill(os.getpid(), signal.SIGKILL)

os.write = torn
archive.append([ended(2, 0), ended(3, 0)])
"""


def in_subprocess(program: str, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_real_short_write_is_rolled_back(out: Path) -> None:
    done = in_subprocess(LIMITED, out)
    assert done.stdout == f"{out} cannot be written: File too large\n0 1\n", done.stderr
    assert places(out) == [(0, 0)]


def test_killed_in_the_middle_of_a_write(out: Path) -> None:
    done = in_subprocess(KILLED, out)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.read_bytes().endswith(b"\n")
    batch = [ended(2, 0), ended(3, 0)]
    archive = Archive(out, samples=1).open(resume=True)
    assert archive.append(batch) == batch[1:]
    archive.finalize()
    assert places(out) == [(0, 0), (2, 0), (3, 0)]
    assert places(paths(out).failures) == [(1, 0)]


SAMPLES = 3
ROLLOUTS = st.tuples(st.integers(0, 6), st.integers(0, SAMPLES - 1), st.sampled_from(get_args(State)))
STEPS = st.lists(
    st.one_of(
        st.lists(ROLLOUTS, max_size=8),  # append a batch
        st.integers(0, 400),  # die, leaving so many bytes of the next row, and resume
        st.just("finalize and resume"),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_whatever_happens_each_rollout_is_there_once_and_in_order(
    steps: list[list[tuple[int, int, State]] | int | str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("any") / "out.jsonl"
    expected: dict[tuple[int, int], bytes] = {}
    archive = Archive(out, SAMPLES).open(resume=True)
    for step in steps:
        if isinstance(step, list):
            events = [ended(example, sample, state=state) for example, sample, state in step]
            new = archive.append(events)
            for event in new:
                place = event.summary.example_index, event.summary.sample_index
                assert place not in expected
                expected[place] = event.row
        else:
            if isinstance(step, int):
                archive.close()
                with out.open("ab") as file:
                    file.write(ended(0, 0).row[:step])
            else:
                archive.finalize()
            archive = Archive(out, SAMPLES).open(resume=True)
        assert archive.count == len(expected)
    archive.finalize()
    rows = [line for path in paths(out)[:2] for line in path.read_bytes().splitlines()]
    assert sorted(rows) == sorted(expected.values())
    for path in paths(out)[:2]:
        assert places(path) == sorted(places(path))
        states = {RolloutRow.model_validate_json(line).state for line in path.read_bytes().splitlines()}
        assert states <= ({"succeeded"} if path == out else {"failed", "cancelled"})
