"""How tickets, claims, samples and weights are spelled in Redis: one line of text each."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gym_queue.lifecycle import RolloutState
from gym_queue.records import Stage, Ticket, Weights

if TYPE_CHECKING:
    from gym_queue.records import Fence


def spell(*parts: str | int) -> str:
    """Spell a ticket or a claim: ``stage|run|example|attempt|samples|losses``. A claim is on one sample."""
    return "|".join(map(str, parts))


def encode(ticket: Ticket) -> str:
    """Spell a ticket."""
    samples = ",".join(map(str, ticket.samples))
    return spell(ticket.stage, ticket.run_id, ticket.example_index, ticket.attempt, samples, ticket.losses)


def decode(member: bytes) -> Ticket:
    """Read a ticket; a claim reads as a ticket of one sample."""
    stage, run_id, index, attempt, samples, losses = member.decode().split("|")
    return Ticket.model_construct(
        stage=Stage(stage),
        run_id=run_id,
        example_index=int(index),
        samples=tuple(map(int, samples.split(","))),
        attempt=int(attempt),
        losses=int(losses),
    )


def claim(fence: Fence) -> str:
    """Spell the claim on one sample."""
    return spell(
        fence.stage, fence.run_id, fence.example_index, fence.attempt, fence.sample_index, fence.losses
    )


class Standing(NamedTuple):
    """What a sample's record says. Once ended, it says the state only."""

    state: RolloutState
    attempt: int = 0
    failures: int = 0
    since: float = 0.0
    worker: str = ""
    losses: int = 0


def standing(record: bytes) -> Standing:
    """Read a sample's record: ``state|attempt|failures|since|worker|nonce|losses``, or just ``state``."""
    state, *rest = record.decode().split("|")
    if not rest:
        return Standing(RolloutState(state))
    attempt, failures, since, worker, _, losses = rest
    return Standing(RolloutState(state), int(attempt), int(failures), float(since), worker, int(losses or 0))


def weights(model: str, record: bytes) -> Weights:
    """Read the newest weights of a model: ``version nonce uri``."""
    version, _, uri = record.decode().split(" ", 2)
    return Weights(model=model, version=int(version), uri=uri)
