"""The table: what was measured, a line each, medians with the least and the most; and what was wanted."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from benchmarks.contenders import CELERY, DRAMATIQ, NEMO, TASKIQ
from benchmarks.parts import look, median

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benchmarks.measurement import Sample
    from benchmarks.parts import Results

_LONG = 10_000
"""Rollouts."""

_COLUMNS: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "noop": {
        "per second": (("rate",), ",.0f"),
        "drain only": (("drain",), ",.0f"),
        "CPU-µs": (("cpu", "*"), ",.0f"),
        "workers": (("cpu", "workers"), ",.0f"),
        "redis": (("cpu", "redis"), ",.0f"),
        "client": (("cpu", "client"), ",.0f"),
        "feeder": (("cpu", "feeder"), ",.0f"),
        "aggregator": (("cpu", "aggregator"), ",.0f"),
        "loop": (("cpu", "event loop"), ",.0f"),
        "agent": (("cpu", "agent"), ",.0f"),
        "model": (("cpu", "model"), ",.0f"),
        "resources": (("cpu", "resources"), ",.0f"),
        "ray": (("cpu", "ray"), ",.0f"),
        "commands": (("commands", "*"), ".1f"),
        "MB worker": (("memory", "workers"), ",.0f"),
        "MB client": (("memory", "client"), ",.0f"),
        "MB redis": (("memory", "redis"), ",.0f"),
        "MB in all": (("in_all", "*"), ",.0f"),
    },
    "sleeping": {
        "makespan s": (("makespan",), ".1f"),
        "ideal s": (("ideal",), ".1f"),
        "times": (("over_ideal",), ".3f"),
        "CPU-µs": (("cpu", "*"), ",.0f"),
        "MB worker": (("memory", "workers"), ",.0f"),
    },
    "latency": {
        f"{name} {p}": ((key, p), ".1f")
        for key, name in {
            "submit_start": "submit-start",
            "accept_start": "accept-start",
            "end_seen": "end-seen",
            "end_seen_of_the_flood": "flood end-seen",
        }.items()
        for p in ("p50", "p99")
    },
    "service": {
        **{
            f"{name} {p}": ((key, p), ".1f")
            for key, name in {
                "submit_start": "submit-start",
                "end_client": "end-client",
                "end_client_of_the_flood": "flood end-client",
                "show": "GET",
            }.items()
            for p in ("p50", "p99")
        },
        "ended a second": (("ended",), ",.0f"),
        "head CPU ms a second": (("head_cpu",), ".1f"),
    },
    "footprint": {
        "bytes queued": (("bytes_queued",), ",.0f"),
        "bytes in flight": (("bytes_in_flight",), ",.0f"),
        "round trips a ticket, alone": (("round_trips", "one_at_a_time"), ".2f"),
        "at once": (("round_trips", "all_at_once"), ".2f"),
    },
    "curve": {
        "per second": (("rate",), ",.0f"),
        "first tenth": (("first_tenth",), ",.0f"),
        "last tenth": (("last_tenth",), ",.0f"),
        "CPU-µs": (("cpu", "*"), ",.0f"),
        "MB worker": (("memory", "workers"), ",.0f"),
        "MB client": (("memory", "client"), ",.0f"),
        "MB redis": (("memory", "redis"), ",.0f"),
        "MB in redis": (("memory", "in redis"), ",.1f"),
    },
    "scale": {
        "per second": (("rate",), ",.0f"),
        "workers busy %": (("busy", "workers"), ".0f"),
        "Redis busy %": (("busy", "redis"), ".0f"),
        "coordinator busy %": (("busy", "coordinator"), ".0f"),
    },
    "start": {"seconds": (("seconds",), ".2f"), "first row after s": (("first_row",), ".2f")},
}
_COLUMNS["work"] = {
    **_COLUMNS["noop"],
    "verifiers": (("cpu", "verifiers"), ",.0f"),
    "MB verifiers": (("memory", "verifiers"), ",.0f"),
}
del _COLUMNS["work"]["client"]


def _cell(samples: Sequence[Sample], path: Sequence[str], form: str) -> str:
    values = [value for sample in samples if (value := look(sample, path)) is not None]
    if not values:
        return ""
    middle = f"{statistics.median(values):{form}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}}-{max(values):{form}})"


def table(part: str, results: Results) -> str:
    """Return the lines of one part."""
    columns = _COLUMNS[part]
    rows = [["", *columns]]
    for name, samples in results.samples.items():
        rows.append([name, *(_cell(samples, *column) for column in columns.values())])
    used = [place for place in range(len(rows[0])) if place == 0 or any(row[place] for row in rows[1:])]
    widths = {place: max(len(row[place]) for row in rows) for place in used}
    lines = [
        "  ".join(row[place].rjust(widths[place]) if place else row[0].ljust(widths[0]) for place in used)
        for row in rows
    ]
    return "\n".join([*lines, *(f"{name}: {why}" for name, why in results.missing.items())])


def verdicts(results: Mapping[str, Results]) -> Iterator[str]:
    """Say what was wanted beside what was found, for the parts that were measured."""
    found = {part: one.samples for part, one in results.items()}
    eights, ones = (found.get("noop", {}).get(f"road, groups of {size}", []) for size in (8, 1))
    yield from _wanted("groups of 8, a second", median(eights, "rate"), 4000)
    peers = [found.get("noop", {}).get(name, []) for name in (DRAMATIQ, TASKIQ)]
    if any(peers):
        ratios = [
            ours["rate"] / max(theirs["rate"] for theirs in others)
            for ours, *others in zip(eights, *filter(None, peers), strict=False)
        ]
        yield from _wanted("groups of 8, times the best of dramatiq and taskiq", _middle(ratios), 1.3)
    if plain := found.get("noop", {}).get(CELERY):
        ratios = [ours["rate"] / theirs["rate"] for ours, theirs in zip(ones, plain, strict=False)]
        yield from _wanted("groups of 1, times plain Celery", _middle(ratios), 3.0)
    yield from _beside_nemo(eights, found.get("noop", {}).get(NEMO, []))
    idle = found.get("latency", {}).get("idle", [])
    yield from _wanted("idle, submit to start, p50 ms", median(idle, "submit_start", "p50"), 5, most=True)
    yield from _wanted("idle, submit to start, p99 ms", median(idle, "submit_start", "p99"), 15, most=True)
    yield from _wanted("idle, end to seen, p99 ms", median(idle, "end_seen", "p99"), 50, most=True)
    service = found.get("service", {})
    for name, samples in service.items():
        if name.startswith("idle"):
            value = median(samples, "end_client", "p99")
            yield from _wanted(f"{name}, end to client, p99 ms", value, 50, most=True)
    shown = median(service.get("busy, a run is shown", []), "show", "p99")
    yield from _wanted("GET /v1/runs/ID at 1,000 rollouts a second, p99 ms", shown, 20, most=True)
    for size, most in ((8, 1536), (1, 3072)):
        samples = found.get("footprint", {}).get(f"groups of {size}", [])
        name = f"groups of {size}, Redis bytes of a queued rollout"
        yield from _wanted(name, median(samples, "bytes_queued"), most, most=True)
        trips = median(samples, "round_trips", "one_at_a_time")
        yield from _wanted(f"groups of {size}, round trips a ticket", trips, 2, most=True)
    for name, samples in found.get("sleeping", {}).items():
        yield from _wanted(f"{name}, times the ideal", median(samples, "over_ideal"), 1.15, most=True)
        yield from _wanted(f"{name}, MB of the worker", median(samples, "memory", "workers"), 1000, most=True)
    yield from _flat(found.get("curve", {}))
    start = found.get("start", {})
    for name, key, limit in (
        ("submit-rollouts --help", "seconds", 0.3),
        ("the embedded stack", "first_row", 4.0),
    ):
        yield from _wanted(f"{name}, s", median(start.get(name, []), key), limit, most=True)


def _flat(curve: Mapping[str, Sequence[Sample]]) -> Iterator[str]:
    """Compare the end of a long run with its beginning, and the longest run with the shortest one that is
    long enough to fill the window.
    """
    for name, samples in curve.items():
        first, last = median(samples, "first_tenth"), median(samples, "last_tenth")
        if first and last:
            yield from _wanted(f"{name}, last tenth to first tenth", last / first, 0.9)
    for process, key in (("the coordinator", "client"), ("Redis", "in redis"), ("a worker", "workers")):
        long = [samples for name, samples in curve.items() if int(name.split()[0].replace(",", "")) >= _LONG]
        peaks = [median(samples, "memory", key) for samples in long]
        if len(peaks) > 1 and peaks[0] and peaks[-1]:
            name = f"peak memory of {process}, longest run to shortest"
            yield from _wanted(name, peaks[-1] / peaks[0], 1.3, most=True)


def _beside_nemo(ours: Sequence[Sample], theirs: Sequence[Sample]) -> Iterator[str]:
    rounds = list(zip(ours, theirs, strict=False))
    times = [our["rate"] / their["rate"] for our, their in rounds]
    yield from _wanted("groups of 8, times NeMo Gym", _middle(times), 30)
    memory = [(look(our, ("in_all", "*")), look(their, ("in_all", "*"))) for our, their in rounds]
    shares = [our / their for our, their in memory if our and their]
    yield from _wanted("groups of 8, memory in all as a share of NeMo Gym's", _middle(shares), 0.2, most=True)


def _middle(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _wanted(name: str, value: float | None, limit: float, *, most: bool = False) -> Iterator[str]:
    if value is not None:
        met = value <= limit if most else value >= limit
        wanted = f"at {'most' if most else 'least'} {limit:,g}"
        yield f"{'met   ' if met else 'MISSED'}  {name}: {value:,.4g} (wanted: {wanted})"
