"""Metric families as the text that Prometheus reads, with those of this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prometheus_client.metrics_core import Metric

    from gym_queue.telemetry.catalogue import Family

CONTENT_TYPE = CONTENT_TYPE_LATEST
"""Of what ``exposed`` returns."""


class _Once:
    """A collector of what is given to it."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            yield family.metric


def exposed(families: Iterable[Family]) -> bytes:
    """Return the families, and CPU, memory, files and start of this process (``process_*``)."""
    registry = CollectorRegistry()
    registry.register(_Once(list(families)))
    ProcessCollector(registry=registry)
    return generate_latest(registry)
