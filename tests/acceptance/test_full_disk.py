"""A disk that fills up under a run: the run pauses, says once why, and goes on when there is room.

The disk is a small tmpfs. Who may not mount one gets a command whose writes are refused on demand.
"""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.acceptance.commands import check_each_once, metrics, submitted, write_input

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EXAMPLES, SAMPLES = 100, 2
ARGUMENTS = ["--model", "stub:?delay=0.1", "--samples", str(SAMPLES), "--concurrency", "16"]

# Stands in for a disk: imported by the command (and by nothing else) when it starts.
REFUSING = textwrap.dedent(
    """
    import errno, os, pathlib, sys

    if any(word.endswith("cli.submit") for word in sys.orig_argv):
        write, full = os.write, pathlib.Path(__file__).with_name("full")

        def refusing(descriptor, data):
            if full.exists() and ".jsonl" in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data)

        os.write = refusing
    """
)


class SmallDisk:
    """A file system of its own, 16 MiB large."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self) -> None:
        """Leave no room."""
        with self._filler.open("wb", buffering=0) as filler:
            while os.statvfs(self.folder).f_bfree:
                filler.write(bytes(4096))

    def free(self) -> None:
        """Leave room again."""
        self._filler.unlink()


class RefusedWrites:
    """A folder whose commands refuse to write rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "sitecustomize.py").write_text(REFUSING)

    def fill(self) -> None:
        """Refuse from now on."""
        (self.folder / "full").touch()

    def free(self) -> None:
        """Refuse no longer."""
        (self.folder / "full").unlink()


@contextmanager
def mounted(folder: Path) -> Iterator[bool]:
    """Mount a tmpfs, if we may."""
    command = ["/bin/mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    may = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield may
    finally:
        if may:
            subprocess.run(["/bin/umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk | RefusedWrites]:
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted(folder) as may:
        write_input(folder, [{"prompt": f"{number}?", "answer": "ok"} for number in range(EXAMPLES)])
        yield SmallDisk(folder) if may else RefusedWrites(folder)


@pytest.fixture(params=["another", "the same"])
def variables(request: pytest.FixtureRequest, redis_url: str) -> dict[str, Any]:
    """Let Redis keep its records on another disk, or on the same one."""
    return {"GYM_QUEUE_REDIS_URL": redis_url} if request.param == "another" else {}


def pauses(variables: dict[str, Any], disk: SmallDisk | RefusedWrites) -> str:
    """Return what a command says of a full disk. A Redis on it notices first, and takes no results."""
    if "GYM_QUEUE_REDIS_URL" in variables or isinstance(disk, RefusedWrites):
        return "the run pauses: out.jsonl cannot be written: No space left on device"
    return "Redis takes no more writes, because it cannot write its append-only file"


def test_a_full_disk_pauses_the_run(disk: SmallDisk | RefusedWrites, variables: dict[str, Any]) -> None:
    with submitted(disk.folder, *ARGUMENTS, **variables) as command:
        command.reach(20)
        disk.fill()
        command.says(pauses(variables, disk))
        assert command.process.poll() is None
        assert command.count() < EXAMPLES * SAMPLES
        disk.free()
        assert command.end() == 0, command.said
    assert command.said.count(pauses(variables, disk)) == 1
    assert command.said.count("there is room again") <= 1
    check_each_once(disk.folder, EXAMPLES, SAMPLES)
    assert metrics(disk.folder)["complete"] is True


def test_a_run_that_waits_for_room_can_be_interrupted_and_resumed(
    disk: SmallDisk | RefusedWrites, variables: dict[str, Any]
) -> None:
    with submitted(disk.folder, *ARGUMENTS, **variables, GYM_QUEUE_SHUTDOWN_GRACE=1) as command:
        command.reach(20)
        disk.fill()
        command.says(pauses(variables, disk))
        command.process.send_signal(signal.SIGINT)
        assert command.end(30) == 130, command.said
    assert "nothing that had ended is lost" in command.said
    assert command.said.rstrip().endswith("--resume")
    kept = command.count()
    disk.free()
    with submitted(disk.folder, *ARGUMENTS, "--resume", **variables) as command:
        assert command.end() == 0, command.said
    assert kept >= 20
    check_each_once(disk.folder, EXAMPLES, SAMPLES)


def test_what_waiting_does_not_heal_ends_the_run(tmp_path: Path, redis_url: str) -> None:
    """No file may grow over 64 KiB: a limit of the process, not a full disk."""
    write_input(tmp_path, [{"prompt": f"{number}?", "answer": "ok"} for number in range(EXAMPLES)])
    arguments = ["--model", "stub:", "--samples", str(SAMPLES)]
    with submitted(tmp_path, *arguments, GYM_QUEUE_REDIS_URL=redis_url, before="ulimit -f 64") as command:
        assert command.end() == 1, command.said
    assert "out.jsonl cannot be written: File too large; nothing that had ended is lost" in command.said
    written = (tmp_path / "out.jsonl").read_bytes()
    assert written == b"" or written.endswith(b"}\n")
    with submitted(tmp_path, *arguments, "--resume", GYM_QUEUE_REDIS_URL=redis_url) as command:
        assert command.end() == 0, command.said
    check_each_once(tmp_path, EXAMPLES, SAMPLES)
