"""Read this first: one rollout, from an example to a row, step by step.

All parts are the real ones, except that the ledger lives in memory (``ledger/memory.py``, the twin of the one
on Redis), that a list stands for the message broker, and that the model is the stub, which always says "ok".
``docs/journey.md`` tells the same story in words.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from gym_queue.coordinator.archive import Archive
from gym_queue.endings import Draft
from gym_queue.engines.stub import StubEngine, StubOptions
from gym_queue.environments.base import Environment, Observation, final_text
from gym_queue.ledger.base import Generated, Retry
from gym_queue.ledger.memory import MemoryLedger
from gym_queue.lifecycle import RolloutState
from gym_queue.pipeline import Pipeline
from gym_queue.records import Example, Group, RunSpec, Stage, Ticket, Verdict
from gym_queue.testing import state_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Any

    from gym_queue.records import Trajectory


class SayOk(Environment):
    """The world: it asks one question and then judges the answer."""

    def inline(self, example: Example) -> bool:
        return False  # judging takes its time: it is a task of its own, in a queue of its own

    def reset(self, example: Example, session: dict[str, Any]) -> Observation:
        return Observation(messages=({"role": "user", "content": example.row["prompt"]},))

    def verify(self, example: Example, trajectory: Trajectory) -> Verdict:
        return Verdict(reward=float(final_text(trajectory) == example.row["answer"]))


class Broker:
    """The message broker: it delivers tickets, and knows nothing else."""

    def __init__(self) -> None:
        self.tickets: list[Ticket] = []

    async def publish(self, tickets: Sequence[Ticket]) -> None:
        self.tickets += tickets


def make_worker(name: str, ledger: MemoryLedger, broker: Broker) -> Pipeline:
    async def engine(_model: str) -> StubEngine:
        return StubEngine(StubOptions(text="ok"))

    def environment(_name: str) -> Environment:
        return SayOk()

    return Pipeline(ledger, broker, engine, environment, worker=name)


RUN = RunSpec(run_id="run", model="stub:", samples=1)
EXAMPLE = Example(
    id="first", environment="say_ok", row={"prompt": "Say ok.", "answer": "ok"}, extra={"level": 3}
)
GROUP = Group(example_index=0, samples=(0,), example=EXAMPLE)


async def test_one_rollout(tmp_path: Path) -> None:
    ledger, broker = MemoryLedger(), Broker()

    # A run is opened under an idempotency key: asked a second time, the ledger returns the same run.
    assert await ledger.open_run(RUN, "key") == await ledger.open_run(RUN, "key")

    # The feeder lets the run accept an example. From now on the ledger answers for its rollouts, and only
    # then a ticket goes to the broker. It is a claim check: which samples of which example, which attempt.
    (ticket,) = await ledger.accept("run", 0, 1, [GROUP])
    assert ticket == Ticket(stage=Stage.GENERATE, run_id="run", example_index=0, samples=(0,), attempt=1)
    assert await state_of(ledger, "run", 0, 0) is RolloutState.QUEUED

    # A worker takes the ticket. Its pipeline claims the sample, lets the model act in the environment, and
    # commits the trajectory.
    gpu = make_worker("gpu", ledger, broker)
    await gpu.generate(ticket)
    assert await state_of(ledger, "run", 0, 0) is RolloutState.VERIFY_QUEUED

    # The same ticket again does nothing: there is nothing left to claim. So a message may be delivered twice.
    await gpu.generate(ticket)

    # What follows was published after the commit: one ticket, for the second stage.
    (verify,) = broker.tickets
    assert (verify.stage, verify.attempt) == (Stage.VERIFY, 1)

    # Whoever claims it gets the trajectory with it: all messages, and the tokens as they were sampled.
    claim = await ledger.claim(verify, "curious", lease=60.0)
    assert claim is not None
    (sample,) = claim.samples
    trajectory = Draft.model_validate_json(sample.payload or b"").trajectory
    assert [message["content"] for message in trajectory.messages] == ["Say ok.", "ok"]
    assert trajectory.tokens is not None
    assert trajectory.tokens.loss_mask == (0, 1, 1, 1, 1, 1, 1, 1, 1)  # the prompt is not the model's doing

    # This worker only wanted to look, and hands its work back. That is a new attempt, so a new ticket.
    receipt = await ledger.commit(sample.fence, Retry(counted=False))
    assert receipt.ticket is not None
    assert receipt.ticket.attempt == 2

    # A verifier claims it, judges, and commits the verdict: the rollout has ended.
    await make_worker("cpu", ledger, broker).verify(receipt.ticket)
    status = await ledger.run("run")
    assert status is not None
    assert (status.accepted, status.succeeded, status.open) == (1, 1, 1)  # open until its row is safe

    # Its end is an event in the results, with the row as it will stand in the file.
    (event,) = await ledger.events("run", after="", limit=10, wait=0)
    assert event.summary.reward == 1.0

    # The aggregator writes the row to disk, and only then lets the ledger drop it. Had it died in between,
    # the event would come again, and the archive would know it.
    with Archive(tmp_path / "out.jsonl", samples=1).open() as archive:
        assert archive.append([event]) == [event]
        assert archive.append([event]) == []
    assert await ledger.acknowledge("run", event.position) == 1
    status = await ledger.run("run")
    assert status is not None
    assert status.open == 0

    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["rollout_id"], row["example_id"], row["state"], row["reward"]) == (
        "run.0.0",
        "first",
        "succeeded",
        1.0,
    )
    assert row["messages"][-1] == {"role": "assistant", "content": "ok"}
    assert row["level"] == 3  # a field of the input that nobody here knows comes back


async def test_a_late_write_is_refused() -> None:
    """A worker that was thought dead comes back. Its work was done again and must not count twice."""
    ledger, broker = MemoryLedger(), Broker()
    await ledger.open_run(RUN, "key")
    (ticket,) = await ledger.accept("run", 0, 1, [GROUP])

    # A worker claims the sample. It gets a fence: the right to write, while this attempt is the newest.
    claim = await ledger.claim(ticket, "slow", lease=60.0)
    assert claim is not None
    fence = claim.samples[0].fence

    # It falls silent. The sweep takes the attempt away, and another worker does the next one.
    receipt = await ledger.commit(fence, Retry())
    assert receipt.ticket is not None
    quick = make_worker("quick", ledger, broker)
    await quick.generate(receipt.ticket)
    await quick.verify(*broker.tickets)

    # Now the slow one is back and tries to write. The ledger compares its fence: refused, nothing changes.
    before = await ledger.run("run")
    assert before is not None
    assert not (await ledger.commit(fence, Generated(payload=b"a trajectory"))).accepted
    assert await ledger.run("run") == before.model_copy(update={"refused": 1})
    assert (before.succeeded, before.retried) == (1, 1)
