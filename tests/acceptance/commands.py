"""Real ``submit-rollouts`` commands for acceptance tests: started, watched, and gone in the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gym_queue.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
SUBMIT = [sys.executable, "-m", "gym_queue.cli.submit"]


class Command:
    """A command in ``folder`` that works on ``in.jsonl`` and writes ``out.jsonl``."""

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.folder = folder
        self.process = process

    @property
    def said(self) -> str:
        """What it wrote to stderr so far."""
        return _said(self.folder, "stderr").read_text()

    def count(self) -> int:
        """Return how many rows both files have."""
        return sum(path.read_bytes().count(b"\n") for path in self.folder.glob("out*.jsonl"))

    def reach(self, rows: int, timeout: float = 60.0) -> None:
        """Wait until the files have so many rows."""

        def there() -> bool:
            assert self.process.poll() is None or self.count() >= rows, self.said
            return self.count() >= rows

        wait_until(there, timeout, what=f"{rows} rows")

    def says(self, words: str, timeout: float = 60.0) -> None:
        """Wait until it has said this."""

        def heard() -> bool:
            assert self.process.poll() is None or words in self.said, self.said
            return words in self.said

        wait_until(heard, timeout, what=f"it to say {words!r}")

    def end(self, timeout: float = 90.0) -> int:
        """Wait for its end and return its exit status."""
        status = self.process.wait(timeout)
        assert "Traceback" not in self.said, self.said
        return status


@contextmanager
def submitted(folder: Path, *arguments: str, before: str = "true", **variables: object) -> Iterator[Command]:
    """Start ``submit-rollouts in.jsonl -o out.jsonl`` with more arguments; make sure that it is gone in the
    end. ``before`` is a command for the shell that becomes it.
    """
    dropped = ("GYM_QUEUE_REDIS_URL", "HEAD_SERVER_URL")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    ours = {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"} | {name: str(it) for name, it in variables.items()}
    arguments = (*SUBMIT, "in.jsonl", "-o", "out.jsonl", *arguments)
    with _said(folder, "stdout").open("w") as stdout, _said(folder, "stderr").open("w") as stderr:
        process = subprocess.Popen(
            ["/bin/bash", "-c", f'{before}; exec "$@"', "bash", *arguments],
            cwd=folder,
            env=kept | ours,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    try:
        yield Command(folder, process)
    finally:
        process.kill()
        process.wait()


def _said(folder: Path, name: str) -> Path:
    """Return where a command's words go: beside its folder, which may be a disk that is full."""
    return folder.with_name(f"{folder.name}.{name}")


def write_input(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def output(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of both files."""
    return [
        json.loads(line)
        for name in ("out.jsonl", "out.failures.jsonl")
        for line in (folder / name).read_text().splitlines()
    ]


def check_each_once(folder: Path, examples: int, samples: int) -> list[dict[str, Any]]:
    """Check that every rollout is there, once, under one run; return the rows."""
    rows = output(folder)
    places = Counter((row["example_index"], row["sample_index"]) for row in rows)
    assert places == Counter((e, s) for e in range(examples) for s in range(samples))
    assert len({row["run_id"] for row in rows}) == 1
    return rows


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out.metrics.json").read_text())
    return found


def children(pid: int) -> dict[int, str]:
    """Return the processes below a process, with their arguments."""
    found: dict[int, str] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
            found |= children(child)
    return found


def running(pid: int) -> bool:
    """Tell whether a process lives."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
