"""What a ledger must look like after any history: the model that ``test_ledger_machine`` compares it with."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Literal

from gym_queue.ledger.base import Ended, Generated, Outcome, Retry, next_ticket
from gym_queue.lifecycle import RUNNING_STATE, TERMINAL, WAITING_STATE, RolloutState
from gym_queue.records import (
    Example,
    Fence,
    RunSpec,
    RunState,
    RunStatus,
    Stage,
    Summary,
    Ticket,
    Timings,
    Weights,
)

RUN = "run-1"
SPEC = RunSpec(run_id=RUN, model="stub:", samples=3)
SOON, LATER = 0.000001, 3600.0

Kind = Literal["generated", "succeeded", "failed", "retry", "retry soon", "retry later", "hand back", "lost"]

RETRIES: dict[Kind, Retry] = {
    "retry": Retry(reason="the engine went away"),
    "retry soon": Retry(delay=SOON),
    "retry later": Retry(delay=LATER),
    "hand back": Retry(counted=False),
    "lost": Retry(counted=False, lost=True, reason="the worker died"),
}

Place = tuple[int, int]
"""Example index and sample index."""


@dataclass
class Rollout:
    """What the model knows of one rollout."""

    state: RolloutState = RolloutState.QUEUED
    attempt: int = 1
    failures: int = 0
    worker: str = ""
    payload: bytes | None = None
    reason: str = ""


@dataclass
class Model:
    """What must be true of the ledger."""

    state: RunState = RunState.OPEN
    cursor: int = 0
    rollouts: dict[Place, Rollout] = field(default_factory=dict)
    waiting: set[Ticket] = field(default_factory=set)
    delayed: dict[Ticket, float] = field(default_factory=dict)
    claims: dict[Fence, bool] = field(default_factory=dict)
    """The value says that the claim is past its deadline."""
    revoked: dict[str, list[Fence]] = field(default_factory=lambda: defaultdict(list))
    log: list[tuple[int, int, str]] = field(default_factory=list)
    archived: int = 0
    retried: int = 0
    lost: int = 0
    refused: int = 0
    republished: int = 0
    weights: Weights | None = None
    dropped: int = 0

    def wanted(self, ticket: Ticket) -> list[int]:
        """Return the samples that a claim of this ticket must grant."""
        final = self.state in (RunState.CANCELLED, RunState.ENDED)
        if final or (self.state is RunState.PAUSED and ticket.stage is Stage.GENERATE):
            return []
        return [sample for sample in ticket.samples if self.waits(ticket, sample)]

    def holds(self, fence: Fence) -> bool:
        """Tell whether this attempt is the newest, is running, and belongs to this worker."""
        rollout = self.rollouts[fence.example_index, fence.sample_index]
        holder = (rollout.state, rollout.attempt, rollout.worker)
        return holder == (RUNNING_STATE[fence.stage], fence.attempt, fence.worker)

    def is_late(self, fence: Fence) -> bool:
        """Tell whether this attempt was lost while its rollout goes on under another."""
        return (fence.example_index, fence.sample_index) in self.open_places() and not self.holds(fence)

    def is_doubled(self, ticket: Ticket) -> bool:
        """Tell whether this ticket waits no more, although its example goes on."""
        groups = {index for index, _ in self.open_places()}
        return ticket.example_index in groups and ticket not in self.waiting

    def write(self, fence: Fence, outcome: Outcome, *, revoke: bool) -> Ticket | None:
        """Do what a commit must do. Returns the ticket that follows, if any."""
        self.claims.pop(fence, None)
        if not self.holds(fence):
            self.refused += 1
            return None
        place = fence.example_index, fence.sample_index
        rollout = self.rollouts[place]
        if revoke:
            self.revoked[fence.worker].append(fence)
        match outcome:
            case Generated(payload=payload):
                self.rollouts[place] = Rollout(RolloutState.VERIFY_QUEUED, payload=payload)
                follower = next_ticket(fence, Stage.VERIFY, 1)
            case Ended(summary=summary):
                self.close(place, summary.state)
                return None
            case Retry(counted=counted, lost=lost, reason=reason):
                rollout.state, rollout.worker = WAITING_STATE[fence.stage], ""
                rollout.attempt += 1
                rollout.failures += counted
                rollout.reason = reason
                self.retried += counted
                self.lost += lost
                follower = next_ticket(fence, fence.stage, rollout.attempt, fence.losses + lost)
        if isinstance(outcome, Retry) and outcome.delay:
            self.delayed[follower] = outcome.delay
        else:
            self.waiting.add(follower)
        return follower

    def end(self, place: Place, state: str) -> None:
        """Do what an end from outside must do."""
        for fence in [fence for fence in self.claims if (fence.example_index, fence.sample_index) == place]:
            if self.holds(fence):
                del self.claims[fence]
                self.revoked[fence.worker].append(fence)
        self.close(place, state)

    def close(self, place: Place, state: str) -> None:
        self.rollouts[place] = Rollout(RolloutState(state), attempt=0)
        self.log.append((*place, state))

    def status(self) -> RunStatus:
        """Return what ``run`` must say."""
        ended = Counter(state for *_, state in self.log)
        return RunStatus(
            spec=SPEC,
            state=self.state,
            cursor=self.cursor,
            accepted=len(self.rollouts),
            succeeded=ended["succeeded"],
            failed=ended["failed"],
            cancelled=ended["cancelled"],
            archived=self.archived,
            retried=self.retried,
            lost=self.lost,
            refused=self.refused,
            republished=self.republished,
            dropped=self.dropped,
            queued=sum(rollout.state is RolloutState.QUEUED for rollout in self.rollouts.values()),
        )

    def somewhere(self) -> set[Place]:
        """Return the rollouts that wait in a ticket or run under a claim: those that can still move."""
        tickets = {
            (ticket.example_index, sample)
            for ticket in (*self.waiting, *self.delayed)
            for sample in ticket.samples
            if self.waits(ticket, sample)
        }
        return tickets | {(f.example_index, f.sample_index) for f in self.claims if self.holds(f)}

    def waits(self, ticket: Ticket, sample: int) -> bool:
        """Tell whether a sample waits for just this ticket."""
        rollout = self.rollouts.get((ticket.example_index, sample))
        waiting = WAITING_STATE[ticket.stage], ticket.attempt
        return rollout is not None and (rollout.state, rollout.attempt) == waiting

    def open_places(self) -> set[Place]:
        return {place for place, rollout in self.rollouts.items() if rollout.state not in TERMINAL}

    def visible(self, place: Place) -> Rollout | None:
        """Return what ``whereabouts`` must say: nothing once the whole group has ended."""
        group_is_open = any(example == place[0] for example, _ in self.open_places())
        return self.rollouts[place] if group_is_open else None


def example(index: int) -> Example:
    return Example(id=f"e{index}", environment="rows", row={"prompt": str(index)})


def summary(place: Place, state: str) -> Summary:
    return Summary.model_validate(
        {
            "example_index": place[0],
            "sample_index": place[1],
            "attempt": 1,
            "state": state,
            "timings": Timings(accepted_at=1.0, ended_at=2.0),
        }
    )


def fence_of(ticket: Ticket, sample: int, worker: str) -> Fence:
    return Fence(
        stage=ticket.stage,
        run_id=ticket.run_id,
        example_index=ticket.example_index,
        sample_index=sample,
        attempt=ticket.attempt,
        worker=worker,
        losses=ticket.losses,
    )


def outcome_of(fence: Fence, kind: Kind) -> Outcome:
    """Return what an attempt commits. What is verified was generated before: it ends instead."""
    place = fence.example_index, fence.sample_index
    if kind in RETRIES:
        return RETRIES[kind]
    if kind == "generated" and fence.stage is Stage.GENERATE:
        return Generated(payload=f"{place} by {fence.worker}, attempt {fence.attempt}".encode())
    state = "failed" if kind == "failed" else "succeeded"
    return Ended(summary=summary(place, state), row=str(place).encode())
