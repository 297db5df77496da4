"""OpenTelemetry traces, where they are wanted: one trace a rollout, a span for each stage and step.

Ids are made of the rollout's id and the attempt. So the spans of the workers that generated and verified it
meet in one trace though nothing is handed on between them. Spans are made when an attempt is over, from its
story; their times are on the ledger's clock, which all workers share.

Nothing of OpenTelemetry is imported unless an endpoint is set, or somebody else in the process has
configured its SDK.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from gym_queue.records import Stage, rollout_id

if TYPE_CHECKING:
    from gym_queue.telemetry.story import Step, Story

_log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Environment variables of OpenTelemetry: either switches traces on."""

_PARTS = {"generating": "generate", "verifying": "verify", "commit": "commit"}
"""Steps that are parts of an attempt, and their spans' names. The other steps are parts of ``generating``."""

_WAITS = {Stage.GENERATE: "queued", Stage.VERIFY: "verify queued"}


def make_tracer(role: str, worker: str) -> Tracer | None:
    """Return what makes spans of attempts in this process; ``None`` where nobody wants them.

    To be called after a fork, in the process whose spans it makes.

    Args:
        role: what this process is (``gpu``, ``cpu``).
        worker: its name.
    """
    if (provider := _configured()) is not None:
        return Tracer(provider)
    if not any(map(os.environ.get, ENDPOINTS)):
        return None
    try:
        provider = _make_provider(role, worker)
    except ImportError as error:
        _log.warning("no traces: %s; pip install 'gym-queue[tracing]'", error)
        return None
    return Tracer(provider)


def _configured() -> Any:
    """Return the SDK's provider that somebody else has set for this process, if any."""
    api = sys.modules.get("opentelemetry.trace")
    provider = api.get_tracer_provider() if api else None
    # The API's own provider, which does nothing, has no sampler.
    return provider if hasattr(provider, "sampler") else None


def _make_provider(role: str, worker: str) -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    name = os.environ.get("OTEL_SERVICE_NAME", "gym_queue")
    attributes = {"service.name": name, "service.instance.id": worker, "gym_queue.role": role}
    provider = TracerProvider(resource=Resource.create(attributes))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def trace_id_of(name: str) -> int:
    """Return the id of a rollout's trace: 128 bits, never 0."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "big") | 1


def span_id_of(*names: object) -> int:
    """Return the id of a span of that name: 64 bits, never 0."""
    text = "\n".join(map(str, names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") | 1


class _Ids:
    """Gives the ids that it was told to (OpenTelemetry's ``IdGenerator``)."""

    trace_id = 1
    span_id = 1

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id

    def is_trace_id_random(self) -> bool:
        return False


class Tracer:
    """An ``Observer`` that makes spans. ``provider`` is one of OpenTelemetry's SDK."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry import context, trace  # noqa: PLC0415

        self._api = trace
        self._nobody = context.Context()
        self._sampler = provider.sampler
        self._tracer: Any = provider.get_tracer("gym_queue")
        self._ids = _Ids()
        self._tracer.id_generator = self._ids  # this tracer's only; the provider keeps its own

    def observe(self, story: Story) -> None:
        """Make the spans of an attempt that is over, and of its rollout if it ended."""
        fence = story.fence
        name = rollout_id(fence.run_id, fence.example_index, fence.sample_index)
        self._ids.trace_id = trace_id_of(name)
        root, attempt = span_id_of(name), (name, fence.stage, fence.attempt)
        facts = _facts(story, name)
        self._span(_WAITS[fence.stage], (*attempt, "wait"), root, story.queued_at, story.claimed_at, facts)
        generating = span_id_of(*attempt, "generating")
        for number, step in enumerate(story.steps):
            if part := _PARTS.get(step.name):
                self._step(story, part, (*attempt, step.name), root, step, facts)
            else:
                self._step(story, step.name, (*attempt, step.name, number), generating, step, facts)
        if (summary := story.summary) is not None and story.outcome == summary.state:
            self._ids.span_id = root
            end, error = summary.timings.ended_at, summary.failure_class or ""
            self._record("rollout", None, story.accepted_at, end, facts | _ending(story), error)

    def _step(
        self, story: Story, name: str, ids: tuple[object, ...], parent: int, step: Step, facts: dict[str, Any]
    ) -> None:
        begin, end = (story.claimed_at + at - story.began for at in (step.begin, step.end))
        self._span(name, ids, parent, begin, end, facts, step.error)

    def _span(
        self,
        name: str,
        ids: tuple[object, ...],
        parent: int,
        begin: float,
        end: float,
        facts: dict[str, Any],
        error: str = "",
    ) -> None:
        self._ids.span_id = span_id_of(*ids)
        self._record(name, self._under(parent), begin, end, facts, error)

    def _under(self, parent: int) -> Any:
        """Return the context of a parent that another process makes: sampled, if its trace is."""
        api, trace_id = self._api, self._ids.trace_id
        sampled = self._sampler.should_sample(None, trace_id, "rollout").decision.is_sampled()
        context = api.SpanContext(trace_id, parent, is_remote=True, trace_flags=api.TraceFlags(sampled))
        return api.set_span_in_context(api.NonRecordingSpan(context))

    def _record(
        self, name: str, context: Any, begin: float, end: float, facts: dict[str, Any], error: str
    ) -> None:
        span = self._tracer.start_span(
            name, context or self._nobody, attributes=facts, start_time=_nanoseconds(begin)
        )
        if error:
            span.set_status(self._api.Status(self._api.StatusCode.ERROR, error))
        span.end(_nanoseconds(max(begin, end)))


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def _facts(story: Story, name: str) -> dict[str, Any]:
    fence = story.fence
    return {
        "gym_queue.run_id": fence.run_id,
        "gym_queue.rollout_id": name,
        "gym_queue.stage": fence.stage.value,
        "gym_queue.attempt": fence.attempt,
        "gym_queue.worker": fence.worker,
        "gym_queue.outcome": story.outcome,
    }


def _ending(story: Story) -> dict[str, Any]:
    summary = story.summary
    if summary is None:
        return {}
    found: dict[str, Any] = {
        "gym_queue.turns": summary.turns,
        "gym_queue.prompt_tokens": summary.usage.prompt_tokens,
        "gym_queue.completion_tokens": summary.usage.completion_tokens,
    }
    if summary.reward is not None:
        found["gym_queue.reward"] = summary.reward
    if summary.failure_class is not None:
        found["gym_queue.failure_class"] = summary.failure_class.value
    return found
