"""The road of one rollout inside a worker: claim, generate, commit, verify, commit. Knows no Celery and no
HTTP.

A worker's task hands a ticket to ``Pipeline.generate`` or ``Pipeline.verify`` and is done when that returns.
What happened to a rollout is a value (an ``Outcome``); the one place that acts on it is ``_commit``.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from gym_queue import endings
from gym_queue.agents.loop import act
from gym_queue.endings import Draft, Place
from gym_queue.errors import GymQueueError, LedgerError, StageTimeoutError, VerifierError
from gym_queue.ledger.base import Generated, Outcome, Retry
from gym_queue.lifecycle import retry_delay
from gym_queue.records import Failure, Stage, Timings, Verdict, rollout_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from gym_queue.engines.base import Engine
    from gym_queue.environments.base import Environment
    from gym_queue.ledger.base import Claim, ClaimedSample, Ledger
    from gym_queue.records import RunSpec, RunStatus, Ticket

_log = logging.getLogger(__name__)

LEASE_MARGIN = 60.0
"""Seconds that a claim outlives its stage's deadline: the worker itself ends the stage first, the sweep is
the backstop.
"""

_LONGEST_PAUSE = 5.0


class Publisher(Protocol):
    """What hands tickets to the broker (Celery, in the product)."""

    async def publish(self, tickets: Sequence[Ticket]) -> None:
        """Send tickets to the queue of their stage. Raises ``BrokerError``; the audit sends them again."""
        ...


class Pipeline:
    """What a worker does with a ticket. One object a process; many tickets at once.

    Args:
        ledger: where rollouts stand.
        publisher: where tickets of the next stage go.
        engine: gives the engine of a model; the same object each time.
        environment: gives the environment of a name; the same object each time.
        worker: this worker's name, the owner of its claims.
    """

    def __init__(
        self,
        ledger: Ledger,
        publisher: Publisher,
        engine: Callable[[str], Awaitable[Engine]],
        environment: Callable[[str], Environment],
        worker: str,
    ) -> None:
        self._ledger = ledger
        self._publisher = publisher
        self._engine = engine
        self._environment = environment
        self._worker = worker
        self._specs: dict[str, asyncio.Future[RunStatus | None]] = {}

    async def generate(self, ticket: Ticket) -> None:
        """Generate the ticket's samples, side by side, and commit each as it ends."""
        await self._serve(ticket, self._generate)

    async def verify(self, ticket: Ticket) -> None:
        """Verify what was generated before, and commit the verdicts."""
        await self._serve(ticket, self._verify)

    async def _serve(
        self, ticket: Ticket, stage: Callable[[Place, Claim, ClaimedSample], Awaitable[Outcome]]
    ) -> None:
        spec = await self._spec(ticket.run_id)
        if spec is None:
            return
        claim = await self._ledger.claim(ticket, self._worker, self._lease(spec, ticket.stage))
        if claim is None:
            return
        rollouts = [self._attempt(spec, claim, sample, stage) for sample in claim.samples]
        if len(rollouts) == 1:
            await rollouts[0]
        else:
            await asyncio.gather(*rollouts)

    async def _spec(self, run_id: str) -> RunSpec | None:
        """Return a run's spec, which never changes: asked for once, however many want it."""
        if run_id not in self._specs:
            self._specs[run_id] = asyncio.ensure_future(self._ledger.run(run_id))
        try:
            status = await asyncio.shield(self._specs[run_id])
        except LedgerError:
            self._specs.pop(run_id, None)
            raise
        return status.spec if status else None

    @staticmethod
    def _lease(spec: RunSpec, stage: Stage) -> float:
        limits = spec.limits
        return (limits.generate_timeout if stage is Stage.GENERATE else limits.verify_timeout) + LEASE_MARGIN

    async def _attempt(
        self,
        spec: RunSpec,
        claim: Claim,
        sample: ClaimedSample,
        stage: Callable[[Place, Claim, ClaimedSample], Awaitable[Outcome]],
    ) -> None:
        fence = sample.fence
        place = Place.model_construct(
            spec=spec,
            example=claim.example,
            example_index=fence.example_index,
            sample_index=fence.sample_index,
        )
        try:
            outcome = await stage(place, claim, sample)
        except asyncio.CancelledError:  # this worker shuts down: nobody failed, so hand the work back
            await asyncio.shield(self._commit(sample, Retry(counted=False), self._lease(spec, fence.stage)))
            raise
        await self._commit(sample, outcome, self._lease(spec, fence.stage))

    async def _generate(self, place: Place, claim: Claim, sample: ClaimedSample) -> Outcome:
        started = time.monotonic()
        queued = max(0.0, claim.claimed_at - sample.queued_at)
        limits = place.spec.limits
        try:
            async with _deadline(limits.generate_timeout, "generating"):
                engine = await self._engine(place.spec.model)
                environment = self._environment(place.example.environment)
                ordinal = place.example_index * place.spec.samples + place.sample_index
                trajectory = await act(place.example, environment, engine, place.spec, ordinal=ordinal)
        except Exception as error:  # noqa: BLE001 - an environment or an engine may raise anything
            timings = self._timings(claim, sample, started, queued=queued)
            return self._failed(place, sample, _understood(error), timings)
        draft = Draft(
            attempt=sample.fence.attempt,
            trajectory=trajectory,
            queued=queued,
            generate=time.monotonic() - started,
        )
        if environment.inline(place.example):
            return await self._judge(place, claim, sample, draft, started)
        return Generated(payload=draft.model_dump_json().encode())

    async def _verify(self, place: Place, claim: Claim, sample: ClaimedSample) -> Outcome:
        draft = Draft.model_validate_json(sample.payload or b"")
        return await self._judge(place, claim, sample, draft, time.monotonic())

    async def _judge(
        self, place: Place, claim: Claim, sample: ClaimedSample, draft: Draft, started: float
    ) -> Outcome:
        """Ask the environment for its verdict and end the rollout with it. ``started``: monotonic, of this
        stage's claim.
        """
        begun = time.monotonic()
        waited = 0.0
        if sample.fence.stage is Stage.VERIFY:
            waited = max(0.0, claim.claimed_at - sample.queued_at)
        failure: GymQueueError | None = None
        verdict = Verdict(reward=None)
        try:
            async with _deadline(place.spec.limits.verify_timeout, "verifying"):
                environment = self._environment(place.example.environment)
                verdict = await _call_verifier(environment, place, draft)
        except Exception as error:  # noqa: BLE001 - the same
            failure = _understood(error)
        timings = self._timings(
            claim,
            sample,
            started,
            queued=draft.queued,
            generate=draft.generate,
            verify_queued=waited,
            verify=time.monotonic() - begun,
        )
        if failure is not None:
            return self._failed(place, sample, failure, timings, draft)
        return endings.succeeded(place, draft, verdict, timings)

    @staticmethod
    def _timings(claim: Claim, sample: ClaimedSample, started: float, **stages: float) -> Timings:
        """Put this stage's length on the ledger's clock, which the claim was stamped with."""
        return Timings(
            accepted_at=sample.accepted_at, ended_at=claim.claimed_at + (time.monotonic() - started), **stages
        )

    @staticmethod
    def _failed(
        place: Place,
        sample: ClaimedSample,
        error: GymQueueError,
        timings: Timings,
        draft: Draft | None = None,
    ) -> Outcome:
        """Decide between another attempt and the end."""
        fence = sample.fence
        # In the generate stage an inline verifier may be what failed: the failure's stage is where it
        # happened.
        stage = Stage.VERIFY if draft else Stage.GENERATE
        failure_class = error.failure_class
        delay = retry_delay(failure_class, sample.failures + 1, place.spec.limits, jitter=random.random())
        if delay is not None:
            name = rollout_id(place.spec.run_id, place.example_index, place.sample_index)
            _log.info("rollout %s attempt %d: %s; next in %.1f s", name, fence.attempt, error, delay)
            return Retry(delay=delay)
        failure = Failure(failure_class=failure_class, stage=stage, error=str(error))
        return endings.failed(place, failure, fence.attempt, timings, draft)

    async def _commit(self, sample: ClaimedSample, outcome: Outcome, lease: float) -> None:
        """Write the outcome, and publish what follows. A ledger that is away is waited for while the claim
        can be ours.
        """
        pause, give_up = 0.1, time.monotonic() + lease
        while True:
            try:
                receipt = await self._ledger.commit(sample.fence, outcome)
                break
            except LedgerError:
                if time.monotonic() > give_up:
                    raise
                await asyncio.sleep(pause * random.random())
                pause = min(2 * pause, _LONGEST_PAUSE)
        if not receipt.accepted:
            _log.warning("late write refused: %s is not the newest attempt", sample.fence)
        elif receipt.ticket is not None:
            await self._publisher.publish([receipt.ticket])


@asynccontextmanager
async def _deadline(seconds: float, doing: str) -> AsyncIterator[None]:
    """``asyncio.timeout`` that raises ``StageTimeoutError`` for its own expiry only."""
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield
    except TimeoutError as expiry:
        if timeout.expired():
            msg = f"{doing} took longer than {seconds:g} s"
            raise StageTimeoutError(msg) from expiry
        raise


def _understood(error: Exception) -> GymQueueError:
    """Give an error its class. One that nobody foresaw is a fault of ours or of the machine, and logged as a
    bug is.
    """
    if isinstance(error, GymQueueError):
        return error
    _log.error("unexpected error in a rollout", exc_info=error)
    return GymQueueError(f"unexpected {type(error).__name__}: {error}")


async def _call_verifier(environment: Environment, place: Place, draft: Draft) -> Verdict:
    """Call the environment's ``verify``, plain or async; whatever it raises is a failure of the verifier, not
    a reward.
    """
    try:
        verdict = environment.verify(place.example, draft.trajectory)
        return await verdict if inspect.isawaitable(verdict) else verdict
    except (GymQueueError, TimeoutError):
        raise
    except Exception as error:
        msg = f"verifier raised {type(error).__name__}: {error}"
        raise VerifierError(msg) from error
