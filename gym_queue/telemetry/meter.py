"""What a worker counts of its attempts: stage latencies, outcomes, tokens.

The numbers lie in anonymous memory that forked children share: each child of a prefork pool writes a row of
its own, the parent adds the rows up. No lock, no file, and a child that is replaced leaves its counts to the
next one in its place, so that no counter ever falls.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left
from typing import TYPE_CHECKING

from gym_queue.records import Stage
from gym_queue.telemetry import catalogue as the

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gym_queue.telemetry.catalogue import Family
    from gym_queue.telemetry.story import Story

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
"""Seconds: upper bounds of the histograms' buckets. Prometheus adds up those of all workers."""

LATENCIES = ("queued", "generate", "verify_queued", "verify", "total")
OUTCOMES = ("generated", "succeeded", "failed", "retried", "refused", "lost", "stopped")
"""See ``Story``. Attempts that a worker claims are never cancelled by it."""

_TOKENS = ("prompt", "completion")
_HISTOGRAM = len(BOUNDS) + 2  # the bucket past all bounds, and the sum
_ATTEMPT = {
    (stage, outcome): len(LATENCIES) * _HISTOGRAM + number
    for number, (stage, outcome) in enumerate((stage, outcome) for stage in Stage for outcome in OUTCOMES)
}
_TOKEN = {kind: len(LATENCIES) * _HISTOGRAM + len(_ATTEMPT) + number for number, kind in enumerate(_TOKENS)}
_WIDTH = len(LATENCIES) * _HISTOGRAM + len(_ATTEMPT) + len(_TOKENS)
_PLACE = {name: number * _HISTOGRAM for number, name in enumerate(LATENCIES)}

_STEPS = {"generating": "generate", "verifying": "verify"}
_WAITS = {Stage.GENERATE: "queued", Stage.VERIFY: "verify_queued"}


class Meter:
    """An ``Observer`` that counts.

    Args:
        rows: how many processes may write.
        row: which of them this one is, from 0.
    """

    def __init__(self, rows: int = 1, row: Callable[[], int] = lambda: 0) -> None:
        self._memory = memoryview(mmap.mmap(-1, 8 * rows * _WIDTH)).cast("d")
        self._rows = rows
        self._row = row

    def observe(self, story: Story) -> None:
        """Count an attempt that is over."""
        memory, start, stage = self._memory, self._row() * _WIDTH, story.fence.stage
        self._time(start, _WAITS[stage], story.waited)
        for step in story.steps:
            if (name := _STEPS.get(step.name)) and not step.error:
                self._time(start, name, step.end - step.begin)
        if (summary := story.summary) is not None and story.outcome == summary.state:
            self._time(start, "total", summary.timings.ended_at - summary.timings.accepted_at)
        if (usage := story.usage) is not None:
            memory[start + _TOKEN["prompt"]] += usage.prompt_tokens
            memory[start + _TOKEN["completion"]] += usage.completion_tokens
        memory[start + _ATTEMPT[stage, story.outcome]] += 1

    def _time(self, start: int, name: str, seconds: float) -> None:
        place = start + _PLACE[name]
        self._memory[place + bisect_left(BOUNDS, seconds)] += 1
        self._memory[place + _HISTOGRAM - 1] += seconds

    def families(self) -> Iterator[Family]:
        """Yield what all processes have counted."""
        memory = self._memory
        sums = [sum(memory[place::_WIDTH].tolist()) for place in range(_WIDTH)]
        seconds, attempts, tokens = (
            the.STAGE_SECONDS.family(),
            the.ATTEMPTS.family(),
            the.WORKER_TOKENS.family(),
        )
        bounds = [f"{bound:g}" for bound in BOUNDS]
        for name, place in _PLACE.items():
            *counts, total = sums[place : place + _HISTOGRAM]
            seconds.add_histogram(bounds, counts, total, name)
        for (stage, outcome), place in _ATTEMPT.items():
            attempts.add(sums[place], stage.value, outcome)
        for kind, place in _TOKEN.items():
            tokens.add(sums[place], kind)
        yield from (seconds, attempts, tokens)
