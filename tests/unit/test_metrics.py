from __future__ import annotations

import json
import math
import random
import statistics
from itertools import combinations
from typing import TYPE_CHECKING, Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gym_queue.coordinator.archive import Archive, paths
from gym_queue.coordinator.latency import LONGEST, RELATIVE_ERROR, LatencyHistogram
from gym_queue.coordinator.metrics import Metrics, pass_at_k, write_metrics
from gym_queue.coordinator.rows import read_summary
from gym_queue.errors import StorageError
from gym_queue.records import FailureClass
from tests.unit.output_rows import State, ended

if TYPE_CHECKING:
    from pathlib import Path

    from gym_queue.coordinator.metrics import RunMetrics
    from gym_queue.ledger.base import Event

SAMPLES = 6


def some_run(seed: int) -> list[Event]:
    """Return a run with all that occurs: failed and cancelled samples, no rewards, an incomplete example."""
    draw = random.Random(seed)
    events = []
    for example in range(12):
        for sample in range(SAMPLES if example else 2):
            state: State = draw.choices(get_args(State), (12, 1, 1))[0] if example % 3 else "succeeded"
            reward = draw.choice((1.0, 0.0, 1.0 - 1e-12, 0.25)) if example != 5 else None
            failure_class = draw.choice((FailureClass.TIMEOUT, FailureClass.MODEL))
            metrics = {"length": draw.random()} if sample % 2 else {}
            events.append(
                ended(
                    example,
                    sample,
                    state=state,
                    reward=reward,
                    metrics=metrics,
                    failure_class=failure_class,
                    seconds=draw.expovariate(0.1),
                )
            )
    draw.shuffle(events)
    return events


def measured(events: list[Event], samples: int = SAMPLES) -> RunMetrics:
    metrics = Metrics(samples)
    for event in events:
        metrics.add(event.summary)
    return metrics.snapshot()


def recomputed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the same numbers from output rows alone, by definition and without any of the tested code."""
    groups: dict[int, list[float]] = {}
    for row in rows:
        if row.get("reward") is not None:
            groups.setdefault(row["example_index"], []).append(row["reward"])
    rewards = [reward for group in groups.values() for reward in group]
    mean = statistics.fmean(rewards)
    wins = {
        k: [
            statistics.fmean(max(some) > 1 - 1e-9 for some in combinations(g, k))
            for g in groups.values()
            if len(g) >= k
        ]
        for k in (1, 2, 4, 6)
    }
    return {
        "mean": mean,
        "standard_error": statistics.stdev(rewards) / math.sqrt(len(rewards)),
        "standard_error_clustered": math.hypot(*(sum(r - mean for r in g) for g in groups.values()))
        / len(rewards),
        "pass_at_k": {str(k): statistics.fmean(each) for k, each in wins.items()},
        "avg_at_k": {
            "6": statistics.fmean(statistics.fmean(g) for g in groups.values() if len(g) == SAMPLES)
        },
        "length": statistics.fmean(
            row["metrics"]["length"] for row in rows if "length" in row.get("metrics", {})
        ),
        "turns": statistics.fmean(row["turns"] for row in rows if row["state"] == "succeeded"),
        "prompt": sum(row["usage"]["prompt_tokens"] for row in rows),
        "completion": sum(row["usage"]["completion_tokens"] for row in rows),
        "seconds": statistics.fmean(
            row["timings"]["generate"] for row in rows if row["state"] != "cancelled"
        ),
    }


@pytest.mark.parametrize("seed", range(5))
def test_the_file_agrees_with_the_rows(tmp_path: Path, seed: int) -> None:
    out = tmp_path / "out.jsonl"
    metrics = Metrics(SAMPLES)
    archive = Archive(out, SAMPLES).open()
    for event in archive.append(some_run(seed)):
        metrics.add(event.summary)
    archive.finalize()
    write_metrics(paths(out).metrics, metrics.snapshot(accepted=68), {"run_id": "run"})
    file = json.loads(paths(out).metrics.read_text())
    rows = [json.loads(line) for path in paths(out)[:2] for line in path.read_bytes().splitlines()]
    own = {
        **file["reward"],
        **file["tokens"],
        "pass_at_k": file["pass_at_k"],
        "avg_at_k": file["avg_at_k"],
        "turns": file["turns"],
        "length": file["environment_metrics"]["length"],
        "seconds": file["latency"]["generate"]["mean"],
    }
    for name, value in recomputed(rows).items():
        assert own[name] == pytest.approx(value, rel=1e-9), name
    states = [row["state"] for row in rows]
    assert file["rollouts"] == {
        "accepted": 68,
        "ended": 68,
        "succeeded": states.count("succeeded"),
        "failed": states.count("failed"),
        "cancelled": states.count("cancelled"),
    }
    failures = [row["class"] for row in rows if row["state"] == "failed"]
    assert file["failures_by_class"] == {name: failures.count(name) for name in sorted(set(failures))}
    assert (file["run_id"], file["examples"]["seen"], file["examples"]["ended"]) == ("run", 12, 11)


def test_metrics_are_rebuilt_from_the_archive(tmp_path: Path) -> None:
    events = some_run(7)
    with Archive(tmp_path / "out.jsonl", SAMPLES).open() as archive:
        archive.append(events)
    metrics = Metrics(SAMPLES)
    with Archive(tmp_path / "out.jsonl", SAMPLES).open(resume=True, on_row=metrics.add):
        assert same(metrics.snapshot(), measured(events))
    assert [read_summary(event.row) for event in events] == [event.summary for event in events]


def same(one: RunMetrics, two: RunMetrics) -> bool:
    """Compare but for the last digits, which depend on the order of the additions."""
    flat = [_leaves(metrics.model_dump()) for metrics in (one, two)]
    assert flat[0] == pytest.approx(flat[1], rel=1e-9, nan_ok=True)
    return True


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: math.nan if value is None else value}
    return {key: leaf for part in value for key, leaf in _leaves(value[part], f"{name}.{part}").items()}


@given(seed=st.integers(0, 50), order=st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(seed: int, order: random.Random) -> None:
    events = some_run(seed)
    shuffled = events.copy()
    order.shuffle(shuffled)
    assert same(measured(events), measured(shuffled))


def test_a_snapshot_changes_nothing() -> None:
    events = some_run(3)
    metrics = Metrics(SAMPLES)
    for event in events:
        metrics.add(event.summary)
        metrics.snapshot()
    assert metrics.snapshot() == measured(events)


def test_examples_that_ended_are_forgotten() -> None:
    metrics = Metrics(2)
    for example in range(1000):
        metrics.add(ended(example, 0, state="failed").summary)
        metrics.add(ended(example, 1).summary)
        assert not metrics._open
    assert metrics.snapshot().examples.model_dump() == {"seen": 1000, "ended": 1000, "scored": 0}


def test_a_failure_is_no_reward_of_zero() -> None:
    metrics = measured(
        [ended(0, 0), ended(0, 1, state="failed"), ended(0, 2, state="cancelled"), ended(0, 3)], 4
    )
    assert (metrics.reward.mean, metrics.reward.count) == (1.0, 2)
    assert metrics.pass_at_k == {1: 1.0, 2: 1.0, 4: None}
    assert metrics.avg_at_k == {4: None}
    assert metrics.failures_by_class == {FailureClass.TIMEOUT: 1}


def test_a_reward_that_is_no_number_is_no_reward() -> None:
    metrics = measured([ended(0, 0, reward=math.nan, metrics={"f1": math.inf}), ended(1, 0, reward=0.5)], 1)
    assert (metrics.reward.mean, metrics.reward.count, metrics.environment_metrics) == (0.5, 1, {})


def test_nothing_ended_yet() -> None:
    metrics = measured([])
    assert metrics.reward.model_dump() == {
        "count": 0,
        "mean": None,
        "standard_error": None,
        "standard_error_clustered": None,
    }
    assert metrics.pass_at_k == {1: None, 2: None, 4: None, 6: None}
    assert metrics.latency["total"].model_dump() == dict.fromkeys(("mean", "p50", "p90", "p99")) | {
        "count": 0
    }


def test_the_standard_errors_survive_a_large_offset() -> None:
    rewards = [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    plain, shifted = (
        measured(
            [ended(i, j, reward=offset + r) for i, g in enumerate(rewards) for j, r in enumerate(g)], 2
        ).reward
        for offset in (0.0, 1e6)
    )
    for reward in (plain, shifted):
        assert reward.standard_error == pytest.approx(math.sqrt(0.3 / 6), rel=1e-9)
        assert reward.standard_error_clustered == pytest.approx(math.sqrt(2) / 6, rel=1e-9)


@pytest.mark.parametrize(("samples", "ks"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_pass_at_powers_of_two_and_at_all_samples(samples: int, ks: list[int]) -> None:
    assert list(measured([], samples).pass_at_k) == ks


def test_pass_at_k_of_a_large_group() -> None:
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
    assert pass_at_k(10, 0, 10) == 0.0
    assert pass_at_k(10, 1, 10) == 1.0


@given(st.lists(st.floats(1e-6, LONGEST), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99]))
def test_quantiles_are_within_their_error(durations: list[float], share: float) -> None:
    histogram = LatencyHistogram()
    for seconds in durations:
        histogram.add(seconds)
    true = sorted(durations)[math.ceil(share * len(durations)) - 1]
    assert histogram.quantile(share) == pytest.approx(true, rel=RELATIVE_ERROR * 1.0001)
    assert histogram.snapshot().mean == pytest.approx(statistics.fmean(durations))


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 1e12])
def test_durations_out_of_range_are_counted_at_its_end(seconds: float) -> None:
    histogram = LatencyHistogram()
    histogram.add(seconds)
    assert histogram.snapshot().count == 1
    assert histogram.quantile(0.5) == pytest.approx(
        1e-6 if seconds < 1 else LONGEST, rel=RELATIVE_ERROR * 1.0001
    )


def test_cancelled_rollouts_have_no_latency() -> None:
    metrics = measured([ended(0, 0, state="cancelled"), ended(1, 0, state="failed", seconds=3.0)], 1)
    assert {stage: latency.count for stage, latency in metrics.latency.items()} == {
        "queued": 1,
        "generate": 1,
        "verify_queued": 0,
        "verify": 0,
        "total": 1,
    }
    assert metrics.latency["total"].mean == 6.0


def test_metrics_that_cannot_be_written_leave_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.metrics.json"
    write_metrics(path, measured([]), {})
    before = path.read_text()
    (tmp_path / "out.metrics.json.tmp").mkdir()
    with pytest.raises(StorageError, match=r"out\.metrics\.json cannot be written: Is a directory"):
        write_metrics(path, measured(some_run(0)), {})
    assert path.read_text() == before


def test_what_the_infrastructure_failed_did_not_end_on_its_own() -> None:
    metrics = Metrics(1)
    metrics.add(ended(0, 0).summary)
    metrics.add(ended(1, 0, state="failed", failure_class=FailureClass.INFRASTRUCTURE).summary)
    metrics.add(ended(2, 0, state="failed", failure_class=FailureClass.TIMEOUT).summary)
    metrics.add(ended(3, 0, state="cancelled").summary)
    assert metrics.ended_on_its_own() == 3
