"""The benchmark runs, and says what it found: as a table, and every sample as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_short_benchmark_measures_and_keeps_its_samples(tmp_path: Path) -> None:
    kept = tmp_path / "samples.json"
    short = ["--rounds", "1", "--rollouts", "128", "--no-peers", "--quick", "--json", str(kept)]
    command = [sys.executable, "-m", "benchmarks", "noop", "latency", *short]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(kept.read_text())["results"]
    (eights,) = found["noop"]["samples"]["road, groups of 8"]
    (idle,) = found["latency"]["samples"]["idle"]
    assert eights["rate"] > 0
    assert eights["drain"] > 0
    assert {"workers", "redis", "feeder", "aggregator"} <= eights["cpu"].keys()
    assert 0 < idle["submit_start"]["p50"] <= idle["submit_start"]["p99"]
    assert "road, groups of 8" in done.stdout
    assert "idle, submit to start, p50 ms" in done.stdout


def test_a_part_that_does_not_exist_is_refused() -> None:
    command = [sys.executable, "-m", "benchmarks", "everything"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no such part: everything; there are noop, work" in done.stderr
