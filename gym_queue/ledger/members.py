"""How tickets and claims are spelled as members of Redis' sorted sets: one line of text each."""

from __future__ import annotations

from gym_queue.records import Stage, Ticket


def encode(ticket: Ticket) -> str:
    """Spell a ticket: ``stage|run|example|attempt|samples``."""
    samples = ",".join(map(str, ticket.samples))
    return f"{ticket.stage}|{ticket.run_id}|{ticket.example_index}|{ticket.attempt}|{samples}"


def decode(member: bytes) -> Ticket:
    """Read a ticket; a claim reads as a ticket of one sample."""
    stage, run_id, index, attempt, samples = member.decode().split("|")
    return Ticket.model_construct(
        stage=Stage(stage),
        run_id=run_id,
        example_index=int(index),
        samples=tuple(map(int, samples.split(","))),
        attempt=int(attempt),
    )


def claim(stage: Stage, run_id: str, example_index: int, sample_index: int, attempt: int) -> str:
    """Spell the claim on one sample."""
    return f"{stage}|{run_id}|{example_index}|{attempt}|{sample_index}"
