"""What Prometheus reads of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from gym_queue.telemetry.exposition import exposed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gym_queue.telemetry.catalogue import Family


def samples(text: bytes) -> dict[str, float]:
    """Return what Prometheus would store, by name and labels (in the order of their names)."""
    shown = {}
    for family in text_string_to_metric_families(text.decode()):
        for name, labels, value, *_ in family.samples:
            inside = ",".join(f"{key}={label}" for key, label in sorted(labels.items()))
            shown[f"{name}{{{inside}}}" if inside else name] = value
    return shown


def shown(families: Iterable[Family]) -> dict[str, float]:
    """Return what is shown of these."""
    return samples(exposed(families))
