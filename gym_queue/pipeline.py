"""The road of one rollout inside a worker: claim, generate, commit, verify, commit. Knows no Celery and no
HTTP.

A worker's task hands a ticket to ``Pipeline.generate`` or ``Pipeline.verify`` and is done when that returns.
What happened to a rollout is a value (an ``Outcome``, made in ``stages``); the one place that acts on it is
``_commit``.
"""

from __future__ import annotations

import asyncio
import logging
import random
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from gym_queue.deadline import Deadline
from gym_queue.errors import BrokerError, LedgerError, StageTimeoutError, WorkerStoodStillError
from gym_queue.ledger.base import Ended, Retry, fence_of
from gym_queue.quarantine import Quarantine
from gym_queue.records import Limits, Stage
from gym_queue.stages import Stages, longest
from gym_queue.telemetry.story import Story, about, outside, step

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

    from gym_queue.engines.base import Engine
    from gym_queue.environments.base import Environment
    from gym_queue.errors import GymQueueError
    from gym_queue.ledger.base import Claim, ClaimedSample, Ledger, Outcome, Receipt
    from gym_queue.records import Fence, RunSpec, RunStatus, Ticket, Weights
    from gym_queue.telemetry.story import Observer

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

_LONGEST_PAUSE = 5.0

_PATIENCE_AT_THE_END = 5.0
"""Seconds that a worker which shuts down waits for a ledger that is away, and for environments to close;
then the sweep does it.
"""

_PATIENCE_BEFORE = Limits().store_timeout
"""Seconds that a ledger is waited for before the run's own limits are known."""


class Publisher(Protocol):
    """What hands tickets to the broker (Celery, in the product)."""

    async def publish(self, tickets: Sequence[Ticket]) -> None:
        """Send tickets to the queue of their stage. Raises ``BrokerError``; the audit sends them again."""
        ...


class Attempt(NamedTuple):
    """Names one attempt, whoever owns it."""

    stage: Stage
    run_id: str
    example_index: int
    sample_index: int
    attempt: int


def attempts_of(ticket: Ticket) -> list[Attempt]:
    """Return the attempts that a ticket is good for, one a sample."""
    return [
        Attempt(ticket.stage, ticket.run_id, ticket.example_index, sample, ticket.attempt)
        for sample in ticket.samples
    ]


def attempt_of(fence: Fence) -> Attempt:
    """Return the attempt that a fence names."""
    return Attempt(fence.stage, fence.run_id, fence.example_index, fence.sample_index, fence.attempt)


class Pipeline:
    """What a worker does with a ticket. One object a process; many tickets at once, on one event loop.

    Args:
        ledger: where rollouts stand.
        publisher: where tickets of the next stage go.
        engine: gives the engine of a model; the same object each time.
        environment: gives the environment of a name; the same object each time.
        worker: this worker's name, the owner of its claims.
        slots: how many rollouts this process holds at once; ``None``: one ticket at a time.
        watch: see ``Stages``.
        observers: who wants to know of each attempt.
        ended: told as the rollouts of a ticket end, but for those of a ticket that was never claimed; in the
            context of who serves the ticket.
    """

    def __init__(
        self,
        ledger: Ledger,
        publisher: Publisher,
        engine: Callable[[str], Awaitable[Engine]],
        environment: Callable[[str], Environment],
        worker: str,
        slots: int | None = None,
        watch: Callable[[float | None], object] = lambda _: None,
        observers: Sequence[Observer] = (),
        ended: Callable[[], object] = lambda: None,
    ) -> None:
        self._ledger = ledger
        self._publisher = publisher
        self._stages = Stages(engine, environment, self._newest, watch)
        self._worker = worker
        self._observers = observers
        self._ended = ended
        self._quarantine = Quarantine(slots)
        self._specs: dict[str, asyncio.Task[RunStatus | None]] = {}
        self._held: set[Attempt] = set()
        self._running: dict[Attempt, asyncio.Task[None] | None] = {}
        self._trouble: set[type[GymQueueError]] = set()

    async def generate(self, ticket: Ticket) -> None:
        """Generate the ticket's samples, side by side, and commit each as it ends."""
        await self._serve(ticket)

    async def verify(self, ticket: Ticket) -> None:
        """Verify what was generated before, and commit the verdicts."""
        await self._serve(ticket)

    def running(self) -> frozenset[Attempt]:
        """Return the attempts that are worked on: from before their claim until after their commit."""
        return frozenset(self._running)

    def drop(self, fences: Iterable[Fence]) -> int:
        """Stop working on these attempts: they were taken away, or ended by somebody else.

        Nothing is committed or handed back, and other samples of their tickets go on. To be called on the
        pipeline's event loop. Returns how many were stopped.
        """
        tasks = [self._running.get(attempt_of(fence)) for fence in fences]
        dropped = sum(task is not None and task.cancel() for task in tasks)
        if dropped:
            _log.info("dropped %d rollouts: no longer ours", dropped)
        return dropped

    async def _serve(self, ticket: Ticket) -> None:
        attempts = attempts_of(ticket)
        if not self._held.isdisjoint(attempts):  # the audit cannot see that it waits here, or runs already
            return
        self._held.update(attempts)
        try:
            with about(ticket):
                await self._admit(ticket, attempts)
        except LedgerError as error:  # it says once that it is away; the audit publishes the ticket again
            _log.debug("ticket %s is left to the audit: %s", ticket, error)
        finally:
            self._held.difference_update(attempts)

    async def _admit(self, ticket: Ticket, attempts: Collection[Attempt]) -> None:
        spec = await self._spec(ticket.run_id)
        if spec is None:  # the run is forgotten: so may its ticket be
            await self._ledger.claim(ticket, self._worker, 0.0)
            return
        async with self._quarantine.admit(ticket.losses, spec.limits):
            self._running.update(dict.fromkeys(attempts))
            try:
                claim = await self._claim(ticket, spec.limits)
                if claim is not None:
                    await self._work(spec, claim)
            finally:
                for attempt in attempts:
                    self._running.pop(attempt, None)

    async def _spec(self, run_id: str) -> RunSpec | None:
        """Return a run's spec, which never changes: asked for once, however many want it."""
        if run_id not in self._specs:
            self._specs[run_id] = outside(_patiently(lambda: self._ledger.run(run_id), _PATIENCE_BEFORE))
        try:
            status = await asyncio.shield(self._specs[run_id])
        except Exception:
            self._specs.pop(run_id, None)
            raise
        if status is None:  # it may be submitted again under its id
            self._specs.pop(run_id, None)
            return None
        return status.spec

    async def _newest(self, spec: RunSpec) -> Weights | None:
        """Ask for the newest weights of a run's model. Raises ``LedgerError`` after ``store_timeout``."""
        return await _patiently(lambda: self._ledger.weights(spec.model), spec.limits.store_timeout)

    async def _claim(self, ticket: Ticket, limits: Limits) -> Claim | None:
        """Claim a ticket. Where no answer comes, it may be ours all the same: then it is handed back.

        Otherwise nobody would work on it until its deadline, and it would pass for a rollout that overran.
        """
        try:
            async with asyncio.timeout(limits.store_timeout):
                return await self._ledger.claim(ticket, self._worker, longest(ticket.stage, limits))
        except (LedgerError, TimeoutError):  # the ledger says once that it is away
            lost = "the answer to its claim was lost"
            await self._hand_back(self._fences(ticket), lost, limits.store_timeout)
            return None
        except asyncio.CancelledError:
            left = self._fences(ticket)
            await asyncio.shield(self._hand_back(left, self._farewell, _PATIENCE_AT_THE_END))
            raise

    def _fences(self, ticket: Ticket) -> list[Fence]:
        return [fence_of(ticket, sample, self._worker) for sample in ticket.samples]

    @property
    def _farewell(self) -> str:
        return f"worker {self._worker} stopped and handed it back"

    async def _work(self, spec: RunSpec, claim: Claim) -> None:
        """Work on all samples of a claim, and hand back what has not ended when this worker shuts down."""
        tasks: dict[asyncio.Task[None], Fence] = {}
        for sample in claim.samples:
            task = asyncio.create_task(self._attempt(spec, claim, sample))
            tasks[task] = sample.fence
            attempt = attempt_of(sample.fence)
            self._running[attempt] = task
            task.add_done_callback(partial(self._forget, attempt))
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            await asyncio.shield(self._abandon(tasks))
            raise
        for task in tasks:
            if not task.cancelled():  # else it was dropped
                task.result()  # only now, when none of the others is left to run on unseen

    def _forget(self, attempt: Attempt, _: asyncio.Task[None]) -> None:
        self._running.pop(attempt, None)
        self._ended()

    async def _abandon(self, tasks: dict[asyncio.Task[None], Fence]) -> None:
        """Stop, hand back, and let environments close: nobody failed. One that never began is among them."""
        left = [fence for task, fence in tasks.items() if not task.done()]
        for task in tasks:
            task.cancel()
        handed_back = self._hand_back(left, self._farewell, _PATIENCE_AT_THE_END)
        await asyncio.gather(handed_back, asyncio.wait(tasks, timeout=_PATIENCE_AT_THE_END))
        for task in tasks:
            if task.done() and not task.cancelled() and (error := task.exception()):
                _log.error("a rollout that was handed back failed as well", exc_info=error)

    async def _hand_back(self, fences: Sequence[Fence], reason: str, patience: float) -> None:
        retry = Retry(counted=False, reason=reason)
        await asyncio.gather(*(self._commit(fence, retry, patience) for fence in fences))

    async def _attempt(self, spec: RunSpec, claim: Claim, sample: ClaimedSample) -> None:
        limits = spec.limits
        began = max(sample.accepted_at, claim.opened_at)
        left = began + limits.rollout_timeout - claim.claimed_at
        story = _story(claim, sample) if self._observers else None
        with about(story or sample.fence):
            _log.debug("claimed")
            try:
                outcome = await self._stages.outcome(spec, claim, sample, left)
                with step("commit"):
                    receipt = await self._commit(sample.fence, outcome, limits.store_timeout)
                _log.debug("committed: %s", result := _result(outcome, receipt))
                if story is not None:
                    story.outcome = result
                    story.summary = outcome.summary if isinstance(outcome, Ended) else None
            finally:
                if story is not None:
                    self._tell(story)

    def _tell(self, story: Story) -> None:
        for observer in self._observers:
            observer.observe(story)

    async def _commit(self, fence: Fence, outcome: Outcome, patience: float) -> Receipt | None:
        """Write the outcome, and publish what follows. A ledger that is away is waited for, ``patience``
        seconds; after that the outcome is lost (``None``), and this worker hands the attempt back when it can
        (``maintenance.disown``).
        """
        try:
            receipt = await _patiently(lambda: self._ledger.commit(fence, outcome), patience)
        except LedgerError as error:
            self._say_once(LedgerError, f"outcomes are lost, for the ledger takes none: {error}")
            return None
        self._trouble.discard(LedgerError)
        if receipt.ticket is not None:
            await self._publish(receipt.ticket)
        elif not receipt.accepted and not isinstance(outcome, Retry):
            _log.warning("late write refused: %s is not the newest attempt", fence)
        return receipt

    async def _publish(self, ticket: Ticket) -> None:
        """Publish what follows, if the broker takes it: the rollout itself has not failed."""
        try:
            await self._publisher.publish([ticket])
        except BrokerError as error:
            self._say_once(BrokerError, f"tickets are left to the audit: {error}")
        else:
            self._trouble.discard(BrokerError)

    def _say_once(self, trouble: type[GymQueueError], sentence: str) -> None:
        """Say it for the first of the many rollouts that meet the same trouble, until it is over."""
        if trouble not in self._trouble:
            self._trouble.add(trouble)
            _log.warning("%s", sentence)


def _story(claim: Claim, sample: ClaimedSample) -> Story:
    return Story(
        fence=sample.fence,
        accepted_at=sample.accepted_at,
        queued_at=sample.queued_at,
        claimed_at=claim.claimed_at,
    )


def _result(outcome: Outcome, receipt: Receipt | None) -> str:
    """Say in a word what became of an attempt (see ``Story``)."""
    if receipt is None:
        return "lost"
    if not receipt.accepted:
        return "refused"
    match outcome:
        case Ended(summary=summary):
            return summary.state
        case Retry():
            return "retried"
    return "generated"


async def _patiently(ask: Callable[[], Awaitable[_Answer]], patience: float) -> _Answer:
    """Repeat a call that is safe to repeat until the ledger answers, ``patience`` seconds at most."""
    pause = 0.1
    sentence = f"no answer of the ledger within {patience:g} s"
    try:
        async with Deadline(patience, sentence):
            while True:
                try:
                    return await ask()
                except LedgerError:
                    await asyncio.sleep(pause * random.random())
                    pause = min(2 * pause, _LONGEST_PAUSE)
    except (StageTimeoutError, WorkerStoodStillError) as expiry:
        raise LedgerError(sentence) from expiry
