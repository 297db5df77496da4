"""Every metric there is: its name, type, labels and meaning. ``docs/reference/metrics.md`` shows the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prometheus_client.metrics_core import Metric


@dataclass(frozen=True)
class Definition:
    """One metric. ``meaning`` is what Prometheus shows as its help."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()

    def family(self) -> Family:
        """Return an empty family of samples."""
        return Family(self)


class Family:
    """Samples of one metric. Only values that are known are added: what is unknown is left out."""

    def __init__(self, definition: Definition) -> None:
        made = {
            "gauge": GaugeMetricFamily,
            "counter": CounterMetricFamily,
            "histogram": HistogramMetricFamily,
        }[definition.kind]
        self.metric: Metric = made(definition.name, definition.meaning, labels=definition.labels)

    def add(self, value: float, *labels: str) -> Family:
        """Add the sample of these labels, in the order of the definition."""
        self.metric.add_metric(labels, value)  # type: ignore[attr-defined]
        return self

    def add_histogram(self, bounds: Sequence[str], counts: Sequence[float], total: float, label: str) -> None:
        """Add a histogram: how many observations each bucket has (the last is past all bounds), and their
        sum.
        """
        seen, buckets = 0.0, []
        for bound, count in zip((*bounds, "+Inf"), counts, strict=True):
            seen += count
            buckets.append((bound, seen))
        self.metric.add_metric([label], buckets, total)  # type: ignore[attr-defined]


def _gauge(name: str, meaning: str, *labels: str) -> Definition:
    return Definition(f"gym_queue_{name}", "gauge", meaning, labels)


def _counter(name: str, meaning: str, *labels: str) -> Definition:
    return Definition(f"gym_queue_{name}_total", "counter", meaning, labels)


# --- of the whole fleet: a head's ---------------------------------------------------------------------------

LEDGER_UP = _gauge("ledger_up", "1 if the ledger answered this scrape, else 0.")
BROKER_UP = _gauge("broker_up", "1 if the broker answered this scrape, else 0.")
WORKERS = _gauge("workers", "Workers that hold a lease.", "kind")
SERVERS = _gauge("servers", "Servers that are registered.")
SLOTS = _gauge("slots", "Rollouts that these workers can hold at once, by whether they do.", "kind", "state")
LEASE_AGE = _gauge("lease_age_seconds", "Seconds since the heartbeat of the most silent worker.", "kind")
ROUND_TRIP = _gauge(
    "worker_round_trip_seconds",
    "Seconds from the last probe of a worker until it noted it; of a probe that is on its way, until now.",
    "worker",
    "kind",
)
RUNS = _gauge("runs", "Runs that the ledger knows.", "state")
ROLLOUTS = _gauge(
    "rollouts",
    "Rollouts of those runs: queued, in_flight (begun by a worker), unarchived (ended, but in no file yet).",
    "state",
)
ACCEPTED = _counter("rollouts_accepted", "Rollouts that the ledger took in.")
ENDED = _counter("rollouts_ended", "Rollouts that ended.", "state")
FAILED = _counter("rollouts_failed", "Rollouts that ended as failed.", "class")
TOKENS = _counter("tokens", "Tokens of rollouts that ended with a trajectory.", "kind")
DEPTH = _gauge("queue_depth", "Tickets that lie in a queue of the broker.", "queue")
TICKETS = _gauge("queue_tickets", "Tickets that wait for a worker, by the ledger.", "queue")
OLDEST = _gauge("queue_oldest_seconds", "Seconds that the oldest of these tickets has waited.", "queue")
DELAYED = _gauge("retries_delayed", "Retries that wait out their backoff.")
RETRIED = _counter("attempts_retried", "Failed attempts that were tried again.")
LOST = _counter("attempts_lost", "Attempts whose worker died, and that were tried again.")
REFUSED = _counter("writes_refused", "Late or doubled writes that the fence refused.")
REPUBLISHED = _counter("tickets_republished", "Tickets that the broker lacked and the audit sent again.")
DROPPED = _counter("tickets_dropped", "Tickets that no rollout waited for: doubled or outdated.")

FLEET = (
    LEDGER_UP,
    BROKER_UP,
    WORKERS,
    SERVERS,
    SLOTS,
    LEASE_AGE,
    ROUND_TRIP,
    RUNS,
    ROLLOUTS,
    ACCEPTED,
    ENDED,
    FAILED,
    TOKENS,
    DEPTH,
    TICKETS,
    OLDEST,
    DELAYED,
    RETRIED,
    LOST,
    REFUSED,
    REPUBLISHED,
    DROPPED,
)

# --- of one process: the port of a worker or of beat --------------------------------------------------------

READY = _gauge("ready", "1 if /ready answers 200, else 0.", "role")

WORKER_INFO = _gauge("worker_info", "Always 1; its labels name the worker.", "worker", "kind", "node")
WORKER_SLOTS = _gauge(
    "worker_slots", "Slots of this worker by whether they are in use (CPU workers count tickets).", "state"
)
SILENCE = _gauge("worker_lease_age_seconds", "Seconds since this worker renewed its lease.")
STAGE_SECONDS = Definition(
    "gym_queue_worker_stage_seconds",
    "histogram",
    "Seconds that a rollout spent in a stage that it passed here; total: from acceptance to its end.",
    ("stage",),
)
ATTEMPTS = _counter(
    "worker_attempts", "Attempts that this worker claimed, by what came of them.", "stage", "outcome"
)
WORKER_TOKENS = _counter(
    "worker_tokens", "Tokens of what this worker generated, by the engine's count.", "kind"
)

_GPU = ("gpu", "name", "uuid")
GPU_USE = _gauge("gpu_utilization_ratio", "Share of the last moments that the GPU was busy, 0 to 1.", *_GPU)
GPU_MEMORY_USED = _gauge("gpu_memory_used_bytes", "Memory of the GPU in use, by whomever.", *_GPU)
GPU_MEMORY_TOTAL = _gauge("gpu_memory_total_bytes", "Memory of the GPU.", *_GPU)

WORKER = (
    READY,
    WORKER_INFO,
    WORKER_SLOTS,
    SILENCE,
    STAGE_SECONDS,
    ATTEMPTS,
    WORKER_TOKENS,
    GPU_USE,
    GPU_MEMORY_USED,
    GPU_MEMORY_TOTAL,
)

SWEEPS = _counter("beat_sweeps", "Sweeps that were due, by whether the broker took the message.", "outcome")

BEAT = (READY, SWEEPS)
