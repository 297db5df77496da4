"""What a worker does with a ticket: the road from claim to commit, and what becomes of every failure."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import pytest

from gym_queue.engines.stub import StubEngine, StubOptions
from gym_queue.environments.base import Observation
from gym_queue.errors import (
    EngineSetupError,
    EngineUnavailableError,
    EnvironmentUnavailableError,
    InvalidExampleError,
    ModelError,
    UsageError,
    VerifierError,
)
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.lifecycle import RolloutState
from gym_queue.output import FailedRow, SucceededRow
from gym_queue.records import Limits, Stage, Verdict
from gym_queue.testing import state_of
from tests.unit.road import RUN, Engine, Gate, RecordingPublisher, Road, World, failing_engine, group, raising

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gym_queue.records import Example, Message, Ticket


async def one_row(road: Road, **changes: Any) -> dict[str, Any]:
    """Run one sample to its end and return its row."""
    tickets = await road.submit(group(0, [0]), **changes)
    await road.work(*tickets)
    (row,) = await road.rows()
    return row


async def test_an_inline_verdict_ends_the_rollout_in_one_commit() -> None:
    road = Road()
    (ticket,) = await road.submit(group(0))
    await road.pipeline.generate(ticket)
    assert road.publisher.tickets == []
    rows = await road.rows()
    assert [(row["state"], row["reward"], row["metrics"]) for row in rows] == [
        ("succeeded", 1.0, {"length": 2.0})
    ] * 2
    assert rows[0]["timings"]["verify_queued"] is None
    assert rows[0]["timings"]["verify"] >= 0


async def test_a_queued_verdict_takes_a_ticket_of_its_own() -> None:
    road = Road(World(inline=False))
    (ticket,) = await road.submit(group(0, [1]))
    await road.pipeline.generate(ticket)
    assert await road.events() == []
    (verify,) = road.publisher.take()
    assert (verify.stage, verify.samples, verify.attempt) == (Stage.VERIFY, (1,), 1)
    assert await state_of(road.ledger, RUN, 0, 1) is RolloutState.VERIFY_QUEUED
    await road.pipeline.verify(verify)
    (row,) = await road.rows()
    assert (row["state"], row["reward"], row["sample_index"]) == ("succeeded", 1.0, 1)
    assert row["timings"]["verify_queued"] >= 0
    assert row["trajectory"]["token_ids"]


async def test_the_verify_ticket_is_published_after_the_commit() -> None:
    class Publisher(RecordingPublisher):
        async def publish(self, tickets: Sequence[Ticket]) -> None:
            await super().publish(tickets)
            states.append(await state_of(road.ledger, RUN, 0, 0))

    states: list[RolloutState | None] = []
    road = Road(World(inline=False), publisher=Publisher())
    (ticket,) = await road.submit(group(0, [0]))
    await road.pipeline.generate(ticket)
    assert states == [RolloutState.VERIFY_QUEUED]


async def test_what_was_asked_for_without_a_verifier_has_no_reward() -> None:
    row = await one_row(Road(World(verify=lambda: Verdict(reward=None))))
    assert (row["state"], row["reward"]) == ("succeeded", None)


@pytest.mark.parametrize(
    "engine", [Engine(), failing_engine(ModelError("refused"))], ids=["succeeded", "failed"]
)
async def test_a_row_has_the_fields_of_its_kind_and_those_of_the_input(engine: Engine) -> None:
    road = Road(engine=engine)
    (ticket,) = await road.submit(group(0, [0], level=3, reward="gold", error="none"))
    await road.work(ticket)
    (row,) = await road.rows()
    kind = SucceededRow if row["state"] == "succeeded" else FailedRow
    names = {field.alias or name for name, field in kind.model_fields.items()}
    assert set(row) == names | {"level", "input_reward", "input_error"}
    assert (row["level"], row["input_reward"], row["input_error"]) == (3, "gold", "none")
    assert (row["run_id"], row["rollout_id"], row["example_id"]) == (RUN, f"{RUN}.0.0", "e0")
    assert (row["model"], row["environment"], row["attempt"]) == ("stub:", "world", 1)
    kind.model_validate(row)


async def test_times_are_on_the_ledgers_clock() -> None:
    clock = 1000.0

    def tick() -> float:
        nonlocal clock
        clock += 10.0
        return clock

    row = await one_row(Road(ledger=MemoryLedger(tick)))
    timings = row["timings"]
    assert timings["accepted_at"] % 10 == 0
    assert timings["queued"] == 10.0
    assert timings["accepted_at"] + 10 <= timings["ended_at"] < timings["accepted_at"] + 20


@pytest.mark.parametrize(
    ("error", "failure_class"),
    [
        (ModelError("refused"), "model"),
        (EngineSetupError("no such model"), "invalid"),
        (InvalidExampleError("no prompt"), "invalid"),
        (UsageError("no such environment"), "invalid"),
    ],
)
async def test_g6_what_would_fail_again_fails_at_once(error: Exception, failure_class: str) -> None:
    road = Road(engine=failing_engine(error))
    row = await one_row(road)
    assert (row["state"], row["class"], row["stage"], row["error"]) == (
        "failed",
        failure_class,
        "generate",
        str(error),
    )
    assert "reward" not in row
    assert row["messages"] == []
    assert road.engine.calls == 1  # type: ignore[attr-defined]


class BrokenWorld(World):
    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method

    def inline(self, example: Example) -> bool:
        return self._break("inline") or super().inline(example)

    def reset(self, example: Example, session: dict[str, Any]) -> Observation:
        return self._break("reset") or super().reset(example, session)

    def step(self, example: Example, session: dict[str, Any], message: Message) -> Observation:
        return self._break("step") or Observation(done=True)

    def _break(self, method: str) -> Any:
        if method == self.method:
            raise KeyError(method)


@pytest.mark.parametrize("method", ["inline", "reset", "step"])
async def test_an_environment_that_raises_is_a_failure_of_the_environment(method: str) -> None:
    row = await one_row(Road(BrokenWorld(method)))
    assert (row["class"], row["stage"]) == ("environment", "generate")
    assert f"{method}" in row["error"]
    assert "KeyError" in row["error"]


@pytest.mark.guarantee("G6")
@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(
    "verify",
    [
        raising(VerifierError("no gold")),
        raising(ZeroDivisionError("no gold")),
        raising(TimeoutError("no gold: the judge is slow")),
        lambda: Verdict(reward=math.nan),
        lambda: Verdict(reward=math.inf),
        lambda: Verdict(reward=0.5, metrics={"depth": -math.inf}),
        lambda: 0.0,
        lambda: None,
    ],
    ids=["raises", "raises its own", "times out itself", "nan", "infinity", "metric", "number", "nothing"],
)
async def test_a_verifier_that_cannot_say_is_a_failure_not_a_zero(
    verify: Callable[[], Any], *, inline: bool
) -> None:
    row = await one_row(Road(World(inline=inline, verify=verify)))
    assert (row["state"], row["class"], row["stage"]) == ("failed", "verifier", "verify")
    assert "reward" not in row
    assert row["messages"][-1]["content"] == "ok"  # what was to be judged is there to be looked at


@pytest.mark.guarantee("G7")
async def test_a_model_that_takes_too_long_is_a_timeout() -> None:
    row = await one_row(Road(engine=Engine(Gate())), limits=Limits(generate_timeout=0.01))
    assert (row["class"], row["stage"]) == ("timeout", "generate")
    assert row["error"] == "generating took longer than 0.01 s"


@pytest.mark.guarantee("G7")
async def test_a_verifier_that_takes_too_long_is_a_timeout() -> None:
    row = await one_row(Road(World(verify=Gate())), limits=Limits(verify_timeout=0.01))
    assert (row["class"], row["stage"]) == ("timeout", "verify")


async def test_an_engine_that_is_away_is_tried_again_after_a_delay_and_then_given_up() -> None:
    road = Road(engine=failing_engine(EngineUnavailableError("connection refused")))
    limits = Limits(max_attempts=3, retry_base_delay=1e-9)
    tickets = await road.submit(group(0, [0]), limits=limits)
    for attempt in (1, 2, 3):
        assert [ticket.attempt for ticket in tickets] == [attempt]
        assert await road.events() == []
        await road.pipeline.generate(tickets[0])
        assert road.publisher.tickets == []  # its delay comes first
        tickets = await road.ledger.promote_due(10)
    (row,) = await road.rows()
    assert (row["state"], row["class"], row["attempt"]) == ("failed", "infrastructure", 3)
    assert row["error"] == "connection refused"


async def test_a_judge_that_is_away_is_asked_again_without_generating_again() -> None:
    answers: list[Callable[[], Any]] = [
        raising(EnvironmentUnavailableError("judge away")),
        lambda: Verdict(reward=0.25),
    ]

    def verify() -> Any:
        return answers.pop(0)()

    road = Road(World(inline=False, verify=verify), engine=Engine())
    row = await one_row(road)
    assert (row["state"], row["reward"]) == ("succeeded", 0.25)
    assert road.engine.calls == 1  # type: ignore[attr-defined]


async def test_what_nobody_foresaw_is_infrastructure_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    row = await one_row(Road(engine=failing_engine(RuntimeError("CUDA is on fire"))))
    assert (row["class"], row["attempt"]) == ("infrastructure", 3)
    assert "RuntimeError: CUDA is on fire" in row["error"]
    assert [record.levelno for record in caplog.records if record.exc_info] == [logging.ERROR] * 3


@pytest.mark.parametrize("inline", [True, False])
async def test_half_a_surrogate_pair_is_a_failure_of_the_model(*, inline: bool) -> None:
    """A model cut off within a character can say what no file can hold."""
    road = Road(World(inline=inline), engine=StubEngine(StubOptions.model_construct(text="\ud83d")))
    row = await one_row(road)
    assert (row["state"], row["class"]) == ("failed", "model")


async def test_a_state_that_is_not_json_is_a_failure_of_the_environment() -> None:
    class Strange(World):
        def step(self, example: Example, session: dict[str, Any], message: Message) -> Observation:
            return Observation(done=True, state={"thing": object()})

    row = await one_row(Road(Strange(inline=False)))
    assert (row["state"], row["class"]) == ("failed", "environment")


async def test_an_error_that_quotes_what_no_file_can_hold_is_written_all_the_same() -> None:
    row = await one_row(Road(engine=failing_engine(ModelError("said \ud83d"))))
    assert row["error"] == "said ?"


async def test_a_payload_that_cannot_be_read_fails_and_does_not_get_stuck() -> None:
    road = Road(World(inline=False))
    (ticket,) = await road.submit(group(0, [0]))
    await road.pipeline.generate(ticket)
    road.ledger._runs[RUN].groups[0].samples[0].payload = b"{torn"  # type: ignore[attr-defined]
    await road.work(*road.publisher.take())
    (row,) = await road.rows()
    assert (row["class"], row["stage"]) == ("infrastructure", "verify")
