"""The machine that drives a ledger through random histories, for ``test_ledger_machine``.

Hypothesis makes up the histories and shrinks those that fail. Beside the ledger runs a model, a dict of what
each rollout must look like by now; after every step all that a ledger shows is compared with it. Tickets and
fences are never thrown away, so that most steps are late, doubled or out of order, as in a bad network.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, get_args

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from gym_queue.errors import ConflictError
from gym_queue.ledger.base import Ended
from gym_queue.lifecycle import RUNNING_STATE, WAITING_STATE
from gym_queue.records import Fence, Group, RunState, Stage, Ticket, Weights
from tests.contract.ledger_model import (
    RUN,
    SOON,
    SPEC,
    Kind,
    Model,
    Rollout,
    example,
    fence_of,
    outcome_of,
    summary,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from gym_queue.ledger.base import ClaimedSample, Ledger, OwnedAttempt

WORKERS = ("ann", "bob")
EVERYTHING = 1000

workers = st.sampled_from(WORKERS)
picks = st.integers(0, 9)
groups_of_samples = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True).map(lambda some: tuple(sorted(some))),
    min_size=1,
    max_size=2,
)
kinds = st.sampled_from([*get_args(Kind), "generated", "generated"])
claims = st.tuples(
    st.sampled_from(["waiting", "waiting", "doubled"]), picks, workers, st.sampled_from([3600.0, 0.0])
)
commits = st.tuples(st.sampled_from(["held", "held", "late", "forged"]), picks, kinds)
scripts = st.lists(st.one_of(claims, commits), min_size=4, max_size=12)


class LedgerMachine(RuleBasedStateMachine):
    """Drives one ledger. ``tickets`` and ``fences`` are all that were ever handed out, oldest first."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.ledger = ledger
        self.run = self.runner.run
        self.model = Model()
        self.leases: set[str] = set()
        self.tickets: list[Ticket] = []
        self.fences: list[Fence] = []

    @initialize()
    def open_the_run(self) -> None:
        assert self.run(self.ledger.open_run(SPEC, "key")).spec == SPEC
        self.accept(groups=[(0, 1, 2), (1,)], repeat=False)

    # --- what can happen ----------------------------------------------------------------------------------

    @rule(
        name=st.sampled_from([RUN, "run-2"]), key=st.sampled_from(["key", "other"]), samples=st.integers(3, 4)
    )
    def submit_again(self, name: str, key: str, samples: int) -> None:
        """G8: the same key gives the same run, and nothing writes over a run that stands."""
        spec = SPEC.model_copy(update={"run_id": name, "samples": samples})
        if key == "key" and samples == SPEC.samples:
            assert self.run(self.ledger.open_run(spec, key)).spec == SPEC
        elif key == "key" or name == RUN:
            with pytest.raises(ConflictError):
                self.run(self.ledger.open_run(spec, key))

    @precondition(lambda self: len(self.model.rollouts) < 12)
    @rule(groups=groups_of_samples, repeat=st.booleans())
    def accept(self, groups: list[tuple[int, ...]], *, repeat: bool) -> None:
        model, start = self.model, self.model.cursor
        batch = [
            Group(example_index=start + i, samples=samples, example=example(start + i))
            for i, samples in enumerate(groups)
        ]
        call = (RUN, start, start + len(batch), batch)
        tickets = self.run(self.ledger.accept(*call))
        if model.state is not RunState.OPEN:
            assert tickets == []
            return
        assert [(t.example_index, t.samples, t.attempt) for t in tickets] == [
            (start + i, samples, 1) for i, samples in enumerate(groups)
        ]
        model.cursor += len(batch)
        model.waiting |= set(tickets)
        for group in batch:
            model.rollouts |= {(group.example_index, sample): Rollout() for sample in group.samples}
        if repeat:  # the answer was lost on the way
            assert self.run(self.ledger.accept(*call)) == tickets
        self.tickets += tickets

    @rule(off=st.sampled_from([-2, -1, 1, 2]))
    def accept_at_a_wrong_cursor(self, off: int) -> None:
        start = max(0, self.model.cursor + off)
        group = Group(example_index=start, samples=(0,), example=example(start))
        if start != self.model.cursor:
            assert self.run(self.ledger.accept(RUN, start, start + 5, [group])) == []

    def work(self, steps: list[tuple[Any, ...]]) -> None:
        """Workers claim and commit, in time or not."""
        for which, pick, *rest in steps:
            if len(rest) == 1:
                self.commit(
                    self.chosen(
                        self.fences, self.model.is_late if which == "late" else self.model.holds, pick
                    ),
                    *rest,
                )
            else:
                fits = self.model.is_doubled if which == "doubled" else self.model.waiting.__contains__
                self.claim(self.chosen(self.tickets, fits, pick), *rest)
            self.the_ledger_is_as_the_model_says()

    # Hypothesis leaves out some rules in each history; work is what most of them shall be made of.
    work_in_the_morning = rule(steps=scripts)(work)
    work_at_noon = rule(steps=scripts)(work)
    work_in_the_evening = rule(steps=scripts)(work)

    def claim(self, ticket: Ticket | None, worker: str, lease: float) -> None:
        """Claim: the model says what is granted."""
        if ticket is None:
            return
        model, wanted = self.model, self.model.wanted(ticket)
        claim = self.run(self.ledger.claim(ticket, worker, lease))
        if not (model.state is RunState.PAUSED and ticket.stage is Stage.GENERATE):
            model.waiting.discard(ticket)
        if not wanted:
            assert claim is None
            model.dropped += not (model.state is RunState.PAUSED and ticket.stage is Stage.GENERATE)
            return
        assert claim is not None
        assert claim.example == example(ticket.example_index)
        assert claim.weights == (model.weights if ticket.stage is Stage.GENERATE else None)
        assert [sample.fence for sample in claim.samples] == [fence_of(ticket, s, worker) for s in wanted]
        self.leases.add(worker)
        for sample in claim.samples:
            self.check_grant(sample)
            model.claims[sample.fence] = lease == 0
            self.fences.append(sample.fence)

    @staticmethod
    def chosen(some: list[Any], fits: Callable[[Any], bool], pick: int) -> Any:
        """Return one of those that fit, or ``None`` if there is none."""
        fitting = [one for one in some if fits(one)]
        return fitting[pick % len(fitting)] if fitting else None

    def check_grant(self, sample: ClaimedSample) -> None:
        rollout = self.model.rollouts[sample.fence.example_index, sample.fence.sample_index]
        assert (sample.failures, sample.payload) == (rollout.failures, rollout.payload)
        rollout.state, rollout.worker = RUNNING_STATE[sample.fence.stage], sample.fence.worker

    def commit(self, fence: Fence | None, kind: Kind, *, revoke: bool = False) -> None:
        """G2: written if the model says that this attempt still holds the rollout, else nothing changes."""
        if fence is None:
            return
        outcome = outcome_of(fence, kind)
        accepted = self.model.holds(fence)
        follower = self.model.write(fence, outcome, revoke=revoke)
        receipt = self.run(self.ledger.commit(fence, outcome, revoke=revoke))
        assert receipt.accepted is accepted
        assert receipt.ticket == (follower if follower in self.model.waiting else None)
        if follower:
            self.tickets.append(follower)

    @rule(worker=workers, overdue=st.booleans(), failed=st.booleans())
    def lose(self, worker: str, *, overdue: bool, failed: bool) -> None:
        """The sweep takes a worker's attempts away, as ``maintenance.reap`` does."""
        owned = self.run(self.ledger.owned(worker, 0.0 if overdue else None, EVERYTHING))
        expected = {
            fence
            for fence, over in self.model.claims.items()
            if fence.worker == worker and self.model.holds(fence) and (over or not overdue)
        }
        assert {attempt.fence for attempt in owned} == expected
        for attempt in owned:
            self.check_owned(attempt)
            self.commit(attempt.fence, "failed" if failed else "lost", revoke=True)

    def check_owned(self, attempt: OwnedAttempt) -> None:
        fence = attempt.fence
        rollout = self.model.rollouts[fence.example_index, fence.sample_index]
        assert (attempt.failures, attempt.payload) == (rollout.failures, rollout.payload)
        assert attempt.example == example(fence.example_index)

    @rule(
        index=st.integers(0, 5),
        sample=st.integers(0, 2),
        state=st.sampled_from(["cancelled", "failed", "succeeded"]),
        attempt=st.sampled_from([None, None, 1, 2]),
    )
    def end(self, index: int, sample: int, state: str, attempt: int | None) -> None:
        """From outside, whatever it is doing; or only if that attempt waits."""
        place = index, sample
        ended = Ended(summary=summary(place, state), row=str(place).encode())
        taken = self.run(self.ledger.end(RUN, ended, waiting_attempt=attempt))
        rollout = self.model.rollouts.get(place)
        waits = rollout and rollout.state in WAITING_STATE.values() and rollout.attempt == attempt
        assert taken is bool(place in self.model.open_places() and (attempt is None or waits))
        if taken:
            self.model.end(place, state)

    @rule(worker=workers, limit=st.integers(1, 3))
    def read_what_was_revoked(self, worker: str, limit: int) -> None:
        expected = self.model.revoked[worker]
        assert self.run(self.ledger.revoked(worker, limit)) == expected[:limit]
        del expected[:limit]

    @rule(tickets=st.integers(1, 3), run_id=st.sampled_from([RUN, RUN, "unknown"]))
    def count_republished(self, tickets: int, run_id: str) -> None:
        self.run(self.ledger.count_republished(run_id, tickets))
        self.model.republished += tickets if run_id == RUN else 0

    @rule(version=st.integers(0, 12))
    def announce(self, version: int) -> None:
        weights = Weights(model=SPEC.model, version=version, uri=f"after {len(self.model.log)} rollouts")
        newest = self.model.weights
        is_newer = newest is None or version > newest.version
        assert self.run(self.ledger.announce(weights)) is is_newer
        self.model.weights = weights if is_newer else newest

    @rule(state=st.sampled_from([RunState.OPEN, RunState.OPEN, RunState.PAUSED]))
    def pause_or_open(self, state: RunState) -> None:
        final = self.model.state is RunState.CANCELLED
        assert self.run(self.ledger.set_run_state(RUN, state)) is not final
        if not final:
            self.model.state = state

    @precondition(lambda self: len(self.model.log) > 4)
    @rule()
    def cancel_the_run(self) -> None:
        """Final. What runs may still end; what waits is ended one by one (see ``finish``)."""
        assert self.run(self.ledger.set_run_state(RUN, RunState.CANCELLED)) is (
            self.model.state is not RunState.CANCELLED
        )
        self.model.state = RunState.CANCELLED

    @rule(limit=st.integers(1, 4), upto=st.integers(0, 3))
    def archive(self, limit: int, upto: int) -> None:
        """Read some events, acknowledge a part of them, once more than needed."""
        events = self.run(self.ledger.events(RUN, "", limit, 0))
        assert len(events) == min(limit, len(self.model.log) - self.model.archived)
        if upto < len(events):
            rest = self.run(self.ledger.events(RUN, events[upto].position, EVERYTHING, 0))
            assert len(rest) == len(self.model.log) - self.model.archived - upto - 1
            assert self.run(self.ledger.acknowledge(RUN, events[upto].position)) == upto + 1
            assert self.run(self.ledger.acknowledge(RUN, events[upto].position)) == 0
            self.model.archived += upto + 1

    @rule()
    def promote_due(self) -> None:
        due = {ticket for ticket, delay in self.model.delayed.items() if delay == SOON}
        assert set(self.run(self.ledger.promote_due(EVERYTHING))) == due
        self.model.waiting |= due
        for ticket in due:
            del self.model.delayed[ticket]

    @rule(worker=workers, leave=st.booleans())
    def renew_or_drop_lease(self, worker: str, *, leave: bool) -> None:
        """A worker that owns something stays known: only so does the sweep find what it owns."""
        if not leave:
            assert self.run(self.ledger.heartbeat(worker, {"slots": "1"})) is (worker in self.leases)
            self.leases.add(worker)
            return
        if not self.run(self.ledger.owned(worker, None, EVERYTHING)):
            self.leases.discard(worker)
        self.run(self.ledger.drop_lease(worker))

    # --- what must hold after every step --------------------------------------------------------------------

    @invariant()
    def the_ledger_is_as_the_model_says(self) -> None:
        self.run(self.compare())

    async def compare(self) -> None:
        ledger, model = self.ledger, self.model
        status = await ledger.run(RUN)
        events = await ledger.events(RUN, "", EVERYTHING, 0)
        opened = await ledger.open_rollouts(RUN, EVERYTHING)
        leases = await ledger.leases()
        generate = await ledger.waiting(Stage.GENERATE, 0, EVERYTHING)
        verify = await ledger.waiting(Stage.VERIFY, 0, EVERYTHING)
        assert await ledger.weights(SPEC.model) == model.weights
        assert status is not None
        assert status.model_copy(update={"opened_at": 0.0}) == model.status()
        assert status.open == status.accepted - status.archived
        census = await ledger.census()
        here = {
            name: getattr(status, name) for name in type(census.totals).model_fields if hasattr(status, name)
        }
        assert {name: getattr(census.totals, name) for name in here} == here
        assert (census.queued, census.in_flight) == (status.queued, status.in_flight)
        said = [(event.summary.example_index, event.summary.sample_index) for event in events]
        assert [(*place, event.summary.state) for place, event in zip(said, events, strict=True)] == (
            model.log[model.archived :]
        )
        assert [event.row for event in events] == [str(place).encode() for place in said]
        assert [(one.example_index, one.sample_index, one.state, one.attempt) for one in opened] == [
            (*place, model.rollouts[place].state, model.rollouts[place].attempt)
            for place in sorted(model.open_places())
        ]
        assert {lease.worker for lease in leases} == self.leases
        assert generate[0] + verify[0] == len(generate[1]) + len(verify[1])
        assert {*generate[1], *verify[1]} == model.waiting
        for place in model.rollouts:
            found, rollout = await ledger.whereabouts(RUN, *place), model.visible(place)
            assert (found and (found.state, found.attempt, found.failures, found.worker, found.reason)) == (
                rollout and (rollout.state, rollout.attempt, rollout.failures, rollout.worker, rollout.reason)
            )

    @invariant()
    def each_rollout_ended_at_most_once(self) -> None:
        """G1 about the model itself, which the ledger was just compared with."""
        ended = [entry[:2] for entry in self.model.log]
        assert len(ended) == len(set(ended))
        assert set(ended) == set(self.model.rollouts) - self.model.open_places()

    @invariant()
    def every_open_rollout_is_somewhere(self) -> None:
        """The ground that the audit and the sweep stand on: a ticket that waits, or a claim."""
        if self.model.state is not RunState.CANCELLED:
            assert self.model.somewhere() == self.model.open_places()

    # --- the end -------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            self.finish()
        finally:
            self.run(self.ledger.close())
            self.runner.close()

    def finish(self) -> None:
        """Let all that is open end, by the ways there are; then everything accepted has ended, once."""
        model, ledger = self.model, self.ledger
        self.run(ledger.set_run_state(RUN, RunState.OPEN))
        if model.state is RunState.CANCELLED:
            for one in self.run(ledger.open_rollouts(RUN, EVERYTHING)):
                self.end(one.example_index, one.sample_index, "cancelled", None)
        else:
            model.state = RunState.OPEN
            self.work_off()
        self.the_ledger_is_as_the_model_says()
        events = self.run(ledger.events(RUN, "", EVERYTHING, 0))
        if events:
            self.run(ledger.acknowledge(RUN, events[-1].position))
        model.archived = len(model.log)
        self.the_ledger_is_as_the_model_says()
        assert (model.status().open, model.status().ended) == (0, len(model.rollouts))
        self.run(ledger.forget_run(RUN))
        for worker in WORKERS:
            self.read_what_was_revoked(worker, EVERYTHING)
            assert self.run(ledger.owned(worker, None, EVERYTHING)) == []
            self.run(ledger.drop_lease(worker))
        self.check_that_nothing_is_left()

    def work_off(self) -> None:
        for fence in [fence for fence in self.model.claims if self.model.holds(fence)]:
            self.commit(fence, "succeeded")
        while tickets := [*self.model.waiting, *self.model.delayed]:
            for ticket in tickets:
                self.model.delayed.pop(ticket, None)  # a worker may well claim before the delay is over
                self.claim(ticket=ticket, worker="ann", lease=3600.0)
                for sample in ticket.samples:
                    self.commit(fence_of(ticket, sample, "ann"), "succeeded")

    def check_that_nothing_is_left(self) -> None:
        raise NotImplementedError
