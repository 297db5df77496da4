"""What a run's output says in numbers, summed up as rollouts end.

Memory does not grow with the run: an example is remembered only until all its samples have ended.
``docs/reference/output.md`` explains each number.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gym_queue.coordinator.latency import Latency, LatencyHistogram
from gym_queue.durable import replacement, storage_errors
from gym_queue.records import SCHEMA_VERSION, FailureClass, Record

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gym_queue.records import Summary, Timings

CORRECT = 1.0 - 1e-9
"""A reward from here on counts as correct for pass@k."""

STAGES = ("queued", "generate", "verify_queued", "verify", "total")


class RolloutCounts(Record):
    """Rollouts by how they ended. ``accepted`` is the ledger's count, ``None`` where it was not asked."""

    accepted: int | None
    ended: int
    succeeded: int
    failed: int
    cancelled: int


class ExampleCounts(Record):
    """Examples of which at least one sample ended, all ended, all have a reward."""

    seen: int
    ended: int
    scored: int


class RewardMetrics(Record):
    """Mean reward over the ``count`` rollouts that have one, and how sure it is."""

    count: int
    mean: float | None
    standard_error: float | None
    standard_error_clustered: float | None


class TokenCounts(Record):
    """Tokens of all ended rollouts, as the engine counts them."""

    prompt: int
    completion: int


class Healed(Record):
    """What went wrong on the way and was healed, as the ledger counted it (``RunStatus``)."""

    retried: int = 0
    lost: int = 0
    refused: int = 0
    republished: int = 0
    dropped: int = 0

    def __add__(self, other: Healed) -> Healed:
        ours, theirs = dict(self), dict(other)
        return Healed(**{name: ours[name] + theirs[name] for name in ours})


class RunMetrics(Record):
    """All metrics of a run at one moment."""

    version: int = SCHEMA_VERSION
    rollouts: RolloutCounts
    examples: ExampleCounts
    reward: RewardMetrics
    pass_at_k: dict[int, float | None]
    avg_at_k: dict[int, float | None]
    tokens: TokenCounts
    turns: float | None
    latency: dict[str, Latency]
    failures_by_class: dict[FailureClass, int]
    healed: Healed | None
    environment_metrics: dict[str, float]


@lru_cache(maxsize=4096)
def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate without bias the chance that one of ``k`` samples is correct, if ``c`` of ``n >= k`` were.

    1 - C(n - c, k) / C(n, k), from Chen et al. 2021, "Evaluating Large Language Models Trained on Code",
    arXiv:2107.03374.
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


@dataclass(slots=True)
class _Mean:
    """Running mean and variance (Welford 1962, "Note on a method for calculating corrected sums")."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self.squares += step * (value - self.mean)

    def value(self) -> float | None:
        return self.mean if self.count else None

    def standard_error(self) -> float | None:
        return math.sqrt(self.squares / (self.count - 1) / self.count) if self.count > 1 else None


@dataclass(slots=True)
class _Group:
    """The samples of one example so far. ``offset`` sums rewards, each less the first reward of the run."""

    ended: int = 0
    scored: int = 0
    correct: int = 0
    total: float = 0.0
    offset: float = 0.0


@dataclass(slots=True)
class _Examples:
    """Sums over examples. The last three let the clustered standard error be known for any final mean."""

    samples: int
    ended: int = 0
    scored: int = 0
    average: _Mean = field(default_factory=_Mean)
    passed: dict[int, _Mean] = field(default_factory=dict)
    offset_offset: float = 0.0
    offset_scored: float = 0.0
    scored_scored: int = 0

    def add(self, group: _Group) -> None:
        self.ended += group.ended == self.samples
        for k, passed in self.passed.items():
            if group.scored >= k:
                passed.add(pass_at_k(group.scored, group.correct, k))
        if group.scored == self.samples:
            self.scored += 1
            self.average.add(group.total / group.scored)
        if group.scored:
            self.offset_offset += group.offset * group.offset
            self.offset_scored += group.offset * group.scored
            self.scored_scored += group.scored * group.scored

    def clustered_standard_error(self, count: int, mean_offset: float) -> float | None:
        """Return the standard error of the mean reward, given that samples of one example are alike.

        sqrt(sum over examples of (sum over its samples of (reward - mean))^2) / count, from Miller 2024,
        "Adding Error Bars to Evals", arXiv:2411.00640.
        """
        if self.passed[1].count < 2:  # noqa: PLR2004  one example says nothing about others
            return None
        squares = (
            self.offset_offset - 2 * mean_offset * self.offset_scored + mean_offset**2 * self.scored_scored
        )
        return math.sqrt(max(0.0, squares)) / count


class Metrics:
    """Metrics of one run of ``samples`` samples an example. Each ended rollout must be added exactly once.

    Attributes:
        healed: what the ledger says was healed so far; ``None`` while it was not asked.
    """

    def __init__(self, samples: int) -> None:
        self.healed: Healed | None = None
        self._states: Counter[str] = Counter()
        self._failures: Counter[FailureClass] = Counter()
        self._reward = _Mean()
        self._first_reward: float | None = None
        self._turns = _Mean()
        self._environment: defaultdict[str, _Mean] = defaultdict(_Mean)
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._latency = {stage: LatencyHistogram() for stage in STAGES}
        self._open: defaultdict[int, _Group] = defaultdict(_Group)
        powers = {2**exponent for exponent in range(samples.bit_length())}
        self._examples = _Examples(samples, passed={k: _Mean() for k in sorted(powers | {samples})})

    def counts(self, accepted: int | None = None) -> RolloutCounts:
        """Return the ended rollouts so far, by state."""
        return RolloutCounts(
            accepted=accepted,
            ended=self._states.total(),
            succeeded=self._states["succeeded"],
            failed=self._states["failed"],
            cancelled=self._states["cancelled"],
        )

    def ended_on_its_own(self) -> int:
        """Return how many rollouts ended otherwise than by a failure of the infrastructure."""
        return self._states.total() - self._failures[FailureClass.INFRASTRUCTURE]

    @property
    def mean_reward(self) -> float | None:
        """Mean reward so far (cheap, for a progress bar)."""
        return self._reward.value()

    def add(self, summary: Summary) -> None:
        """Count one ended rollout."""
        self._states[summary.state] += 1
        self._prompt_tokens += summary.usage.prompt_tokens
        self._completion_tokens += summary.usage.completion_tokens
        if summary.failure_class is not None:
            self._failures[summary.failure_class] += 1
        if summary.state == "succeeded":
            self._turns.add(summary.turns)
            for name, value in summary.metrics.items():
                if math.isfinite(value):
                    self._environment[name].add(value)
        if summary.state != "cancelled":
            self._add_timings(summary.timings)
        self._add_to_group(summary)

    def _add_timings(self, timings: Timings) -> None:
        self._latency["total"].add(timings.ended_at - timings.accepted_at)
        for stage in STAGES[:-1]:
            seconds: float | None = getattr(timings, stage)
            if seconds is not None:
                self._latency[stage].add(seconds)

    def _add_to_group(self, summary: Summary) -> None:
        group = self._open[summary.example_index]
        group.ended += 1
        reward = summary.reward
        if summary.state == "succeeded" and reward is not None and math.isfinite(reward):
            if self._first_reward is None:
                self._first_reward = reward
            self._reward.add(reward)
            group.scored += 1
            group.correct += reward >= CORRECT
            group.total += reward
            group.offset += reward - self._first_reward
        if group.ended == self._examples.samples:
            self._examples.add(self._open.pop(summary.example_index))

    def snapshot(self, accepted: int | None = None) -> RunMetrics:
        """Return all metrics so far; examples with samples still to come count with those they have.

        Args:
            accepted: rollouts that the ledger accepted, to be shown beside those that ended.
        """
        examples = copy.deepcopy(self._examples)
        for group in self._open.values():
            examples.add(group)
        mean_offset = self._reward.mean - (self._first_reward or 0.0)
        return RunMetrics(
            rollouts=self.counts(accepted),
            examples=ExampleCounts(
                seen=examples.ended + len(self._open), ended=examples.ended, scored=examples.scored
            ),
            reward=RewardMetrics(
                count=self._reward.count,
                mean=self._reward.value(),
                standard_error=self._reward.standard_error(),
                standard_error_clustered=examples.clustered_standard_error(self._reward.count, mean_offset),
            ),
            pass_at_k={k: passed.value() for k, passed in examples.passed.items()},
            avg_at_k={examples.samples: examples.average.value()},
            tokens=TokenCounts(prompt=self._prompt_tokens, completion=self._completion_tokens),
            turns=self._turns.value(),
            latency={stage: histogram.snapshot() for stage, histogram in self._latency.items()},
            failures_by_class=dict(sorted(self._failures.items())),
            healed=self.healed,
            environment_metrics={name: mean.mean for name, mean in sorted(self._environment.items())},
        )


def write_metrics(path: Path, metrics: RunMetrics, extra: Mapping[str, Any]) -> None:
    """Replace ``OUT.metrics.json`` at once: ``extra`` first (what the run was), then the metrics.

    Raises:
        StorageError: it cannot be written; the file that was there stays.
    """
    content = json.dumps({**extra, **metrics.model_dump(mode="json")}, indent=2, ensure_ascii=False)
    with storage_errors(f"{path} cannot be written"), replacement(path) as file:
        file.write(content.encode() + b"\n")
