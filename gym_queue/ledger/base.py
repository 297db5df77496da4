"""The contract of a ledger: the truth about where every rollout is.

Every method is one atomic step (or says otherwise); any process may die between two of them. Each
implementation must pass ``tests/contract/test_ledger.py`` and ``test_ledger_machine.py``. Times are Unix
seconds on the ledger's own clock, so that workers' clocks may differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pydantic import Field

from gym_queue.census import Surveyed
from gym_queue.lifecycle import RolloutState
from gym_queue.records import Example, Fence, Record, RunSpec, Stage, Summary, Ticket, Weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gym_queue.records import Group, RunState, RunStatus


LONGEST_REASON = 300
"""Characters that a ledger keeps of the reason for a retry."""


def kept_reason(reason: str) -> str:
    """Return what a ledger keeps of the reason for a retry: it may quote a model, and be long or broken."""
    return reason[:LONGEST_REASON].encode(errors="replace").decode()


class Generated(Record):
    """Outcome of a generate attempt whose verification is queued: keep the trajectory, move to
    ``verify_queued``.

    ``payload`` is the encoded trajectory with its timings; the ledger does not look inside.
    """

    payload: bytes


class Ended(Record):
    """Outcome that ends the rollout: the row for the archive goes to the results stream."""

    summary: Summary
    row: bytes


class Retry(Record):
    """Outcome of an attempt that is tried again after ``delay`` seconds, as the next attempt.

    ``counted`` is false where nobody failed (a worker that shuts down hands its work back): such attempts do
    not use up ``max_attempts``. ``lost`` says that the attempt's worker died: the next ticket carries one
    loss more. ``reason`` is what ``why`` shows, one sentence.
    """

    delay: float = Field(default=0.0, ge=0.0)
    counted: bool = True
    lost: bool = False
    reason: str = ""


Outcome = Generated | Ended | Retry


class Receipt(Record):
    """The ledger's answer to a commit. ``accepted`` is false when the fence was refused: drop the work, all
    is well.

    ``ticket`` is what must be published next, if anything. If the process dies before it does, the audit
    publishes it.
    """

    accepted: bool
    ticket: Ticket | None = None


class ClaimedSample(Record):
    """One sample that a claim granted. ``failures`` counts failed attempts of this stage before this one.

    ``unreadable`` says why example or payload cannot be had, though the ledger refers to them: the attempt
    fails.
    """

    fence: Fence
    accepted_at: float
    queued_at: float
    failures: int
    payload: bytes | None = None
    unreadable: str = ""


class Claim(Record):
    """What a worker owns after claiming a ticket: the example and the samples that were still wanted.

    ``opened_at`` is the run's (see ``RunStatus``): what a rollout may take in all counts from there, if that
    is later than when it was accepted. ``weights`` are the newest announced for the run's model, where
    something is to be generated with them.
    """

    example: Example
    samples: tuple[ClaimedSample, ...]
    claimed_at: float
    opened_at: float = 0.0
    weights: Weights | None = None


class OwnedAttempt(Record):
    """An attempt that a worker owns, as the sweep sees it: enough to retry it or to write its last words.
    Of ``example``, ``row`` may be missing.

    ``seen_at`` is when the ledger was asked.
    """

    fence: Fence
    example: Example
    accepted_at: float
    seen_at: float
    failures: int
    payload: bytes | None = None


class OpenRollout(Record):
    """A rollout that has not ended, as the ledger's owner sees it from outside. ``since`` is when its state
    began (or, for a delayed retry, when it will be due), ``seen_at`` when the ledger was asked. Of
    ``example``, ``row`` may be missing.
    """

    example: Example
    example_index: int
    sample_index: int
    accepted_at: float
    seen_at: float
    state: RolloutState
    attempt: int
    since: float


class Whereabouts(Record):
    """All that the ledger knows of one rollout that has not ended (or whose group has not: then its state is
    all that is known, the attempt is 0 and ``since`` is when it was accepted).

    ``worker`` and ``deadline`` are set while a worker owns it. ``ahead`` counts the tickets that have waited
    longer at its stage. ``reason`` is why the last attempt ended, empty if there was none.
    """

    state: RolloutState
    attempt: int
    failures: int
    accepted_at: float
    seen_at: float
    since: float
    worker: str = ""
    deadline: float | None = None
    ahead: int = 0
    reason: str = ""


class Event(Record):
    """One ended rollout in the results stream. ``position`` orders events of a run; acknowledge up to one."""

    position: str
    summary: Summary
    row: bytes


SERVER = "server"
"""The ``kind`` in the lease of a server (``gym_queue.fleet.registry``), which is no worker."""

SILENT_AFTER = 2.5
"""Heartbeats. A worker that has missed two is called silent; one may be late."""


class Lease(Record):
    """One worker, or one server, as its last heartbeat described it. ``age`` is seconds since then.

    ``round_trip`` is how many seconds its last probe took or, if that is more, how long ago one was sent that
    it has not answered; ``None`` if it was never probed.
    """

    worker: str
    age: float
    info: dict[str, str]
    round_trip: float | None = None

    @property
    def is_server(self) -> bool:
        """Whether this is a server and no worker; a worker that has only claimed says nothing of itself."""
        return self.info.get("kind") == SERVER

    def is_silent(self, heartbeat_interval: float) -> bool:
        """Tell whether it has missed more than one heartbeat."""
        return self.age > SILENT_AFTER * heartbeat_interval


def fence_of(ticket: Ticket, sample_index: int, worker: str) -> Fence:
    """Return the fence of one sample of a ticket in a worker's hands."""
    return Fence(
        stage=ticket.stage,
        run_id=ticket.run_id,
        example_index=ticket.example_index,
        sample_index=sample_index,
        attempt=ticket.attempt,
        worker=worker,
        losses=ticket.losses,
    )


def first_ticket(run_id: str, group: Group) -> Ticket:
    """Return the ticket of a group that was just accepted: one for all its samples."""
    return Ticket(
        stage=Stage.GENERATE,
        run_id=run_id,
        example_index=group.example_index,
        samples=group.samples,
        attempt=1,
    )


def next_ticket(fence: Fence, stage: Stage, attempt: int, losses: int = 0) -> Ticket:
    """Return the ticket that follows a committed attempt."""
    return Ticket(
        stage=stage,
        run_id=fence.run_id,
        example_index=fence.example_index,
        samples=(fence.sample_index,),
        attempt=attempt,
        losses=losses,
    )


class Ledger(Surveyed, Protocol):
    """See the module's docstring. All methods raise ``LedgerError`` when the store cannot be reached
    or takes no writes for now (full, read-only, loading): waiting may help.
    """

    async def open_run(self, spec: RunSpec, idempotency_key: str) -> RunStatus:
        """Create a run, or find the one already submitted under this key (G8). Returns how it stands.

        Raises:
            ConflictError: the key was used with a spec of another identity, or the run's id with another key.
        """
        ...

    async def run(self, run_id: str) -> RunStatus | None:
        """Return a run's spec, state and counters, or ``None`` if there is no such run."""
        ...

    async def runs(self) -> list[RunStatus]:
        """Return all runs that have not been forgotten, highest priority first."""
        ...

    async def set_run_state(self, run_id: str, state: RunState) -> bool:
        """Move a run between open and paused, or to a final state. Returns false if it was final already.

        To open it, even one that is open, starts its rollouts' time anew (``RunStatus.opened_at``).
        """
        ...

    async def forget_run(self, run_id: str) -> None:
        """Delete every key of a run. Not atomic; safe to repeat."""
        ...

    async def accept(
        self, run_id: str, cursor: int, next_cursor: int, groups: Sequence[Group]
    ) -> list[Ticket]:
        """Take examples ``cursor`` .. ``next_cursor - 1`` of the run's input; ``groups`` are those with
        samples to do.

        Does nothing, and returns no tickets, unless the run is open and its cursor is exactly ``cursor``: so
        a repeated call accepts nothing twice. Returns the tickets to publish, one a group.
        """
        ...

    async def claim(self, ticket: Ticket, worker: str, lease: float) -> Claim | None:
        """Take ownership of the ticket's samples that are still wanted, for ``lease`` seconds.

        Wanted: the run is open (or paused, and this is not its first stage), the sample waits in the ticket's
        stage, and the ticket's attempt is its newest. ``None`` when no sample is granted: acknowledge the
        ticket and forget it. A worker that has no lease gets one, so that the sweep finds what it owns.
        """
        ...

    async def commit(self, fence: Fence, outcome: Outcome, *, revoke: bool = False) -> Receipt:
        """Write the outcome of an attempt, if it is still the newest and still running (G1, G2).

        ``revoke`` is for whoever writes in its owner's stead: should the owner live, ``revoked`` tells it.
        """
        ...

    async def end(self, run_id: str, ended: Ended, *, waiting_attempt: int | None = None) -> bool:
        """End one rollout (``ended.summary`` says which) from outside, whatever it is doing, and tell its
        owner through ``revoked``. With ``waiting_attempt``: only if that attempt still waits for a worker.

        Returns false if it had ended already, or waits no more.
        """
        ...

    async def revoked(self, worker: str, limit: int) -> list[Fence]:
        """Take the attempts that were taken from a worker, or ended under it, since the last call.

        For saving work only: what is told once and lost would have been refused by the fence all the same.
        """
        ...

    async def open_rollouts(
        self, run_id: str, limit: int, examples: Sequence[int] | None = None
    ) -> list[OpenRollout]:
        """Return rollouts that have not ended, those of the examples accepted first in front, up to
        ``limit``. ``examples``: only of these, by index.
        """
        ...

    async def whereabouts(self, run_id: str, example_index: int, sample_index: int) -> Whereabouts | None:
        """Return where a rollout stands; ``None`` once its whole group has ended (or it never was)."""
        ...

    async def count_republished(self, run_id: str, tickets: int) -> None:
        """Add to a run's count of tickets that the broker lacked. Does nothing for a forgotten run."""
        ...

    async def events(self, run_id: str, after: str, limit: int, wait: float) -> list[Event]:
        """Return ended rollouts behind position ``after`` (``""``: from the first that is not acknowledged).

        Waits up to ``wait`` seconds for one. Reading changes nothing: a reader that dies reads them again.
        """
        ...

    async def acknowledge(self, run_id: str, position: str) -> int:
        """Drop events up to ``position``: the archive holds them. Returns how many. This is what opens the
        window.
        """
        ...

    async def promote_due(self, limit: int) -> list[Ticket]:
        """Move retries whose delay is over to the waiting tickets and return them, to be published."""
        ...

    async def waiting(self, stage: Stage, older_than: float, limit: int) -> tuple[int, list[Ticket]]:
        """Return how many tickets wait for a claim in this stage, and the oldest that have waited
        ``older_than`` s.
        """
        ...

    async def heartbeat(self, worker: str, info: dict[str, str]) -> bool:
        """Renew a worker's lease. Returns false if the lease was not known: new, or reaped meanwhile."""
        ...

    async def leases(self) -> list[Lease]:
        """Return all workers and servers that have a lease."""
        ...

    async def owned(self, worker: str, overdue_by: float | None, limit: int) -> list[OwnedAttempt]:
        """Return attempts a worker owns: all of them, or only those ``overdue_by`` seconds past their
        deadline.
        """
        ...

    async def claimed(self, worker: str, limit: int) -> list[Fence]:
        """Return the attempts that a worker owns by its own list, their names only. Some may have ended."""
        ...

    async def drop_lease(self, worker: str) -> None:
        """Forget a worker that is gone, once it owns nothing."""
        ...

    async def lead(self, office: str, holder: str, term: float) -> bool:
        """Take an office for ``term`` seconds from now (at least a millisecond), or hold it for longer.
        Returns false while another holds it.

        Between two processes it decides who works, not what counts: a holder may learn late that its term
        is over, so whatever it does must be safe if two do it.
        """
        ...

    async def resign(self, office: str, holder: str) -> None:
        """Give an office back before its term is over. Does nothing if another holds it."""
        ...

    async def announce(self, weights: Weights) -> bool:
        """Make a version of a model's weights the newest: every claim of its runs names it from now on.

        Returns false, and changes nothing, if that or a newer version was announced before.
        """
        ...

    async def weights(self, model: str) -> Weights | None:
        """Return the newest weights announced for a model, ``None`` if none ever were."""
        ...

    async def close(self) -> None:
        """Close connections. The ledger cannot be used afterwards."""
        ...
