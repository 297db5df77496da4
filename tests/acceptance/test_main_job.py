"""The main job as a user runs it: a real model, a real task, a second queue; twice with one seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from math import comb, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SIZE, SAMPLES = 24, 4
ENVIRONMENT = "reasoning_gym:chain_sum?min_terms=2&max_terms=4&min_digits=1&max_digits=2"


def submit(out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run the command and return its rows and metrics."""
    variables = {name: value for name, value in os.environ.items() if name != "GYM_QUEUE_REDIS_URL"}
    command = [sys.executable, "-m", "gym_queue.cli.submit", "--environment", ENVIRONMENT]
    command += ["--size", str(SIZE), "--samples", str(SAMPLES), "--seed", "1", "-o", str(out)]
    command += ["--model", "hf:examples/tiny-arithmetic/model"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return rows, json.loads(out.with_suffix(".metrics.json").read_text())


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return submit(tmp_path_factory.mktemp("job") / "rollouts.jsonl")


def test_every_rollout_has_its_row(job: tuple[list[dict[str, Any]], dict[str, Any]]) -> None:
    rows, metrics = job
    places = [(row["example_index"], row["sample_index"]) for row in rows]
    assert places == [(example, sample) for example in range(SIZE) for sample in range(SAMPLES)]
    assert len({row["rollout_id"] for row in rows}) == len(rows)
    for row in rows:
        question, answer = row["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        tokens = row["trajectory"]
        lengths = {len(tokens[name]) for name in ("token_ids", "logprobs", "loss_mask", "weight_version")}
        assert lengths == {row["usage"]["prompt_tokens"] + row["usage"]["completion_tokens"]}
        assert sum(tokens["loss_mask"]) == row["usage"]["completion_tokens"]
        assert all(logprob <= 0 for logprob in tokens["logprobs"])
        assert row["attempt"] == 1
        assert 0 <= row["reward"] <= 1
        assert row["timings"]["generate"] > 0
        assert row["timings"]["verify"] > 0  # the second queue was taken
        assert row["timings"]["verify_queued"] > 0
    assert 0 < metrics["reward"]["mean"] < 1


def test_the_metrics_agree_with_the_rows(job: tuple[list[dict[str, Any]], dict[str, Any]]) -> None:
    rows, metrics = job
    rewards = [row["reward"] for row in rows]
    groups = defaultdict(list)
    for row in rows:
        groups[row["example_id"]].append(row["reward"])
    assert metrics["reward"]["mean"] == pytest.approx(mean(rewards))
    assert metrics["reward"]["standard_error"] == pytest.approx(stdev(rewards) / sqrt(len(rewards)))
    assert metrics["avg_at_k"][str(SAMPLES)] == pytest.approx(mean(mean(group) for group in groups.values()))
    for k in (1, 2, 4):
        correct = [sum(reward == 1.0 for reward in group) for group in groups.values()]
        estimate = mean(1 - comb(SAMPLES - c, k) / comb(SAMPLES, k) for c in correct)
        assert metrics["pass_at_k"][str(k)] == pytest.approx(estimate)
    assert metrics["tokens"]["completion"] == sum(row["usage"]["completion_tokens"] for row in rows)
    assert metrics["rollouts"] == {"accepted": 96, "ended": 96, "succeeded": 96, "failed": 0, "cancelled": 0}


def test_one_seed_gives_the_same_examples_in_the_same_order(
    job: tuple[list[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    rows, _ = job
    again, _ = submit(tmp_path / "rollouts.jsonl")
    shown = [(row["example_id"], row["sample_index"], row["messages"][0]) for row in rows]
    assert [(row["example_id"], row["sample_index"], row["messages"][0]) for row in again] == shown


def test_the_model_is_small() -> None:
    folder = ROOT / "examples/tiny-arithmetic"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 4 * 2**20
