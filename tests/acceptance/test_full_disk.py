"""A full disk while archiving: one sentence, exit status 1, and nothing lost once there is room again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = 200
COMMAND = [sys.executable, "-m", "gym_queue.cli.submit", "in.jsonl", "--model", "stub:", "-o", "out.jsonl"]


def submit(
    folder: Path, *arguments: str, redis_url: str | None, largest_file: int | None
) -> subprocess.CompletedProcess[str]:
    """Run the command; no file that it or its children write may grow over ``largest_file`` KiB."""
    variables = {name: value for name, value in os.environ.items() if name != "GYM_QUEUE_REDIS_URL"}
    variables |= {"PYTHONPATH": str(ROOT)} | ({"GYM_QUEUE_REDIS_URL": redis_url} if redis_url else {})
    limit = f"ulimit -f {largest_file}; " if largest_file else ""
    return subprocess.run(
        ["/bin/bash", "-c", f'{limit}exec "$@"', "bash", *COMMAND, *arguments],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("whose", ["archive", "redis"])
def test_a_full_disk_loses_nothing(tmp_path: Path, redis_url: str, whose: str) -> None:
    rows = [{"prompt": f"{number}?", "answer": "ok"} for number in range(EXAMPLES)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # A Redis of the command's own is held to the same limit as the archive, and meets it first.
    url = redis_url if whose == "archive" else None

    full = submit(tmp_path, redis_url=url, largest_file=64)
    assert full.returncode == 1, full.stderr
    assert "Traceback" not in full.stderr
    assert ("out.jsonl" if whose == "archive" else "append-only file") in full.stderr
    assert "nothing that had ended is lost" in full.stderr
    assert "--resume" in full.stderr
    written = (tmp_path / "out.jsonl").read_bytes()
    assert written == b"" or written.endswith(b"}\n")

    again = submit(tmp_path, "--resume", redis_url=url, largest_file=None)
    assert again.returncode == 0, again.stderr
    ids = [json.loads(line)["example_id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ids == [f"row-{number + 1}" for number in range(EXAMPLES)]
