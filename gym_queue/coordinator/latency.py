"""Quantiles of a stream in fixed memory.

A histogram whose buckets grow geometrically, as in DDSketch (Masson, Rim, Lee: "DDSketch: a fast and
fully-mergeable quantile sketch with relative-error guarantees", VLDB 2019). The kept libraries for this would
bring setuptools or six along, for the thirty lines below.
"""

from __future__ import annotations

import math
from array import array

from gym_queue.records import Record

RELATIVE_ERROR = 0.01
"""A quantile is off by at most this share of its true value, from ``SHORTEST`` to ``LONGEST``."""

SHORTEST = 1e-6
LONGEST = 1e7

_GROWTH = math.log((1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR))
_BUCKETS = 2 + math.ceil(math.log(LONGEST / SHORTEST) / _GROWTH)


class Latency(Record):
    """How long a stage took, over ``count`` rollouts (seconds; ``None`` where there were none).

    ``mean`` is exact, quantiles are within 1 % of the true value.
    """

    count: int
    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


class LatencyHistogram:
    """Durations in seconds; 12 KB however many there are.

    Anything below ``SHORTEST`` (1 microsecond) counts as that, anything above ``LONGEST`` (115 days) as that.
    """

    def __init__(self) -> None:
        self._buckets = array("Q", bytes(8 * _BUCKETS))
        self._count = 0
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        clipped = min(max(seconds, SHORTEST), LONGEST)
        self._buckets[math.ceil(math.log(clipped / SHORTEST) / _GROWTH)] += 1
        self._count += 1
        self._sum += seconds

    def quantile(self, share: float) -> float | None:
        """Return the duration of rank ``ceil(share * count)``, the shortest having rank 1."""
        rank = max(1, math.ceil(share * self._count))
        seen = 0
        for bucket, count in enumerate(self._buckets):
            seen += count
            if seen >= rank:
                return SHORTEST * math.exp(bucket * _GROWTH) * (1 - RELATIVE_ERROR)
        return None

    def snapshot(self) -> Latency:
        """Return count, mean and quantiles so far."""
        return Latency(
            count=self._count,
            mean=self._sum / self._count if self._count else None,
            p50=self.quantile(0.5),
            p90=self.quantile(0.9),
            p99=self.quantile(0.99),
        )
