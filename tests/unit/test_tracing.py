"""One trace a rollout, whichever processes had a part in it; and no OpenTelemetry where nobody wants it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

from gym_queue.environments.base import Observation
from gym_queue.errors import EngineUnavailableError, ModelError
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.records import Stage
from gym_queue.telemetry.tracing import ENDPOINTS, Tracer, make_tracer, trace_id_of
from gym_queue.testing import async_wait_until
from tests.unit.road import RUN, Engine, Gate, Road, World, failing_engine, group

if TYPE_CHECKING:
    from gym_queue.records import Example, Message


class Recorder:
    """An SDK of its own, whose spans are kept."""

    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False, **options)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = Tracer(self.provider)

    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def named(self, name: str) -> ReadableSpan:
        (span,) = [span for span in self.spans() if span.name == name]
        return span


def times(span: ReadableSpan) -> tuple[float, float]:
    """Return begin and end in seconds."""
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time / 1e9, span.end_time / 1e9


def length(span: ReadableSpan) -> float:
    begin, end = times(span)
    return end - begin


def facts(span: ReadableSpan) -> dict[str, Any]:
    return {name.removeprefix("gym_queue."): value for name, value in (span.attributes or {}).items()}


class TwoTurns(World):
    async def step(self, example: Example, session: dict[str, Any], message: Message) -> Observation:
        if session.setdefault("steps", 0):
            return Observation(done=True)
        session["steps"] = 1
        return Observation(messages=({"role": "tool", "content": "4"},))


async def test_a_rollout_is_one_tree_of_spans_though_two_workers_made_them() -> None:
    """Each has its own SDK, and nothing is handed on between them but the ticket."""
    gpu, cpu, ledger, world = Recorder(), Recorder(), MemoryLedger(), TwoTurns(inline=False)
    generates = Road(world, ledger=ledger, observers=[gpu.tracer])
    verifies = Road(world, ledger=ledger, worker="cpu", observers=[cpu.tracer])
    (ticket,) = await generates.submit(group(0, [1]))
    await generates.pipeline.generate(ticket)
    await verifies.work(*generates.publisher.take())
    spans = gpu.spans() + cpu.spans()
    assert [span.name for span in gpu.spans()] == [
        *("queued", "reset", "model", "step 1", "model", "step 2", "generate", "commit")
    ]
    assert [span.name for span in cpu.spans()] == ["verify queued", "verify", "commit", "rollout"]
    assert {span.context.trace_id for span in spans} == {trace_id_of(f"{RUN}.0.1")}
    assert len({span.context.span_id for span in spans}) == len(spans)
    root, generate = cpu.named("rollout"), gpu.named("generate")
    assert root.parent is None
    for span in spans:
        if span is root:
            continue
        assert span.parent is not None
        inside = span.name in {"reset", "model", "step 1", "step 2"}
        assert span.parent.span_id == (generate if inside else root).context.span_id
    for span in spans:
        assert times(root)[0] <= times(span)[0] <= times(span)[1] <= times(root)[1] + 1.0
    (row,) = await generates.rows()
    assert facts(root) == {
        "run_id": RUN,
        "rollout_id": f"{RUN}.0.1",
        "stage": "verify",
        "attempt": 1,
        "worker": "cpu",
        "outcome": "succeeded",
        "turns": 2,
        "prompt_tokens": row["usage"]["prompt_tokens"],
        "completion_tokens": row["usage"]["completion_tokens"],
        "reward": 1.0,
    }


async def test_a_failure_is_seen_where_it_happened_and_in_the_end() -> None:
    recorder = Recorder()
    road = Road(engine=failing_engine(ModelError("gibberish")), observers=[recorder.tracer])
    await road.work(*await road.submit(group(0, [0])))
    statuses = {span.name: span.status.status_code.name for span in recorder.spans()}
    assert statuses["model"] == statuses["generate"] == statuses["rollout"] == "ERROR"
    assert statuses["reset"] == statuses["commit"] == "UNSET"
    assert facts(recorder.named("rollout"))["failure_class"] == "model"


async def test_attempts_have_spans_of_their_own_and_the_rollout_one() -> None:
    recorder = Recorder()
    road = Road(engine=failing_engine(EngineUnavailableError()), observers=[recorder.tracer])
    await road.work(*await road.submit(group(0, [0]), limits={"retry_base_delay": 0.0, "max_attempts": 2}))
    tried = [
        (facts(span)["attempt"], facts(span)["outcome"])
        for span in recorder.spans()
        if span.name == "generate"
    ]
    assert tried == [(1, "retried"), (2, "failed")]
    assert len({span.context.span_id for span in recorder.spans()}) == len(recorder.spans())
    assert recorder.named("rollout")


async def test_a_rollout_that_is_dropped_leaves_its_spans_and_no_end() -> None:
    recorder, gate = Recorder(), Gate()
    road = Road(engine=Engine(gate), observers=[recorder.tracer])
    (ticket,) = await road.submit(group(0, [0]))
    serving = asyncio.create_task(road.pipeline.generate(ticket))
    await async_wait_until(lambda: gate.waiting, what="the rollout to wait")
    road.pipeline.drop(await road.ledger.claimed("gpu", 10))
    await serving
    assert {facts(span)["outcome"] for span in recorder.spans()} == {"stopped"}
    assert "rollout" not in {span.name for span in recorder.spans()}


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, 0), (1.0, 8)])
async def test_a_sampler_decides_for_the_whole_trace(ratio: float, expected: int) -> None:
    recorder = Recorder(sampler=ParentBasedTraceIdRatio(ratio))
    road = Road(observers=[recorder.tracer])
    await road.work(*await road.submit(group(0, [0])))
    assert len(recorder.spans()) == expected


async def test_spans_of_a_stage_last_as_long_as_the_stage() -> None:
    recorder = Recorder()
    road = Road(observers=[recorder.tracer])
    await road.work(*await road.submit(group(0, [0])))
    (row,) = await road.rows()
    timings = row["timings"]
    assert length(recorder.named("queued")) == pytest.approx(timings["queued"], abs=1e-3)
    assert length(recorder.named("generate")) == pytest.approx(timings["generate"], abs=0.1)
    assert length(recorder.named("rollout")) == pytest.approx(
        timings["ended_at"] - timings["accepted_at"], abs=1e-3
    )
    assert facts(recorder.named("verify"))["stage"] == Stage.GENERATE  # it is inline


def test_nothing_is_imported_while_nobody_wants_traces() -> None:
    program = (
        "import sys; from gym_queue.telemetry.tracing import make_tracer; print(make_tracer('gpu', 'me'));"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert answer.stdout.split("\n") == ["None", "[]", ""]


def test_without_the_extra_one_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(ENDPOINTS[0], "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert make_tracer("gpu", "me") is None
    assert "pip install 'gym-queue[tracing]'" in caplog.text


def test_an_sdk_that_somebody_configured_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: recorder.provider)
    assert make_tracer("gpu", "me") is not None
    monkeypatch.undo()
    assert make_tracer("gpu", "me") is None
