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

from pydantic_core import PydanticSerializationError

from gym_queue import endings
from gym_queue.agents.loop import act
from gym_queue.endings import Draft, Place
from gym_queue.errors import (
    EnvironmentFailedError,
    GymQueueError,
    LedgerError,
    ModelError,
    PayloadLostError,
    StageTimeoutError,
    VerifierError,
)
from gym_queue.ledger.base import Generated, Outcome, Retry, fence_of
from gym_queue.lifecycle import retry_delay
from gym_queue.records import Failure, Fence, Stage, Timings, Verdict, rollout_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from gym_queue.engines.base import Engine
    from gym_queue.environments.base import Environment
    from gym_queue.ledger.base import Claim, ClaimedSample, Ledger
    from gym_queue.records import RunSpec, RunStatus, Ticket

    _Stage = Callable[[Place, Claim, ClaimedSample, float], Awaitable[Outcome]]

_log = logging.getLogger(__name__)

LEASE_MARGIN = 60.0
"""Seconds that a claim outlives its stage's deadline: the worker itself ends the stage first, the sweep is
the backstop.
"""

_LONGEST_PAUSE = 5.0

_PATIENCE_AT_THE_END = 5.0
"""Seconds that a worker which shuts down waits for a ledger that is away; then the sweep does it."""


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

    async def _serve(self, ticket: Ticket, stage: _Stage) -> None:
        spec = await self._spec(ticket.run_id)
        if spec is None:  # the run is forgotten: so may its ticket be
            await self._ledger.claim(ticket, self._worker, 0.0)
            return
        claim = await self._claim(ticket, self._lease(spec, ticket.stage))
        if claim is None:
            return
        rollouts = [self._attempt(spec, claim, sample, stage) for sample in claim.samples]
        if len(rollouts) == 1:
            await rollouts[0]
            return
        for error in await asyncio.gather(*rollouts, return_exceptions=True):
            if error is not None:  # only now, when none of the others is left to run on unseen
                raise error

    async def _spec(self, run_id: str) -> RunSpec | None:
        """Return a run's spec, which never changes: asked for once, however many want it."""
        if run_id not in self._specs:
            self._specs[run_id] = asyncio.ensure_future(self._ledger.run(run_id))
        try:
            status = await asyncio.shield(self._specs[run_id])
        except Exception:
            self._specs.pop(run_id, None)
            raise
        if status is None:  # it may be submitted again under its id
            self._specs.pop(run_id, None)
            return None
        return status.spec

    @staticmethod
    def _lease(spec: RunSpec, stage: Stage) -> float:
        limits = spec.limits
        return (limits.generate_timeout if stage is Stage.GENERATE else limits.verify_timeout) + LEASE_MARGIN

    async def _claim(self, ticket: Ticket, lease: float) -> Claim | None:
        """Claim a ticket. Where no answer comes, it may be ours all the same: then it is handed back.

        Otherwise nobody would work on it until its deadline, and it would pass for a rollout that overran.
        """
        try:
            return await self._ledger.claim(ticket, self._worker, lease)
        except LedgerError:
            await self._hand_back(ticket, lease)
            raise
        except asyncio.CancelledError:
            await asyncio.shield(self._hand_back(ticket, _PATIENCE_AT_THE_END))
            raise

    async def _hand_back(self, ticket: Ticket, patience: float) -> None:
        for sample in ticket.samples:
            fence = fence_of(ticket, sample, self._worker)
            await self._commit(fence, Retry(counted=False), patience)

    async def _attempt(self, spec: RunSpec, claim: Claim, sample: ClaimedSample, stage: _Stage) -> None:
        fence = sample.fence
        place = Place.model_construct(
            spec=spec,
            example=claim.example,
            example_index=fence.example_index,
            sample_index=fence.sample_index,
        )
        try:
            outcome = await self._outcome(place, claim, sample, stage)
            await self._commit(fence, outcome, self._lease(spec, fence.stage))
        except asyncio.CancelledError:  # this worker shuts down: nobody failed, so hand the work back
            await asyncio.shield(self._commit(fence, Retry(counted=False), _PATIENCE_AT_THE_END))
            raise

    async def _outcome(self, place: Place, claim: Claim, sample: ClaimedSample, stage: _Stage) -> Outcome:
        """Return what became of an attempt. Whatever was raised on the way has a class and becomes data."""
        started = time.monotonic()
        try:
            _check_readable(sample)
            return await stage(place, claim, sample, started)
        except Exception as error:  # noqa: BLE001 - an environment or an engine may raise anything
            waited = {"queued": _waited(claim, sample)} if sample.fence.stage is Stage.GENERATE else {}
            timings = self._timings(claim, sample, started, **waited)
            return self._failed(place, sample, _understood(error), timings)

    async def _generate(self, place: Place, claim: Claim, sample: ClaimedSample, started: float) -> Outcome:
        spec, example = place.spec, place.example
        async with _deadline(spec.limits.generate_timeout, "generating"):
            engine = await self._engine(spec.model)
            environment = self._environment(example.environment)
            inline = _is_inline(environment, place)
            ordinal = place.example_index * spec.samples + place.sample_index
            trajectory = await act(example, environment, engine, spec, ordinal=ordinal)
        draft = Draft(
            attempt=sample.fence.attempt,
            trajectory=trajectory,
            queued=_waited(claim, sample),
            generate=time.monotonic() - started,
        )
        if inline:
            return await self._judge(place, claim, sample, draft, started)
        return Generated(payload=draft.model_dump_json().encode())

    async def _verify(self, place: Place, claim: Claim, sample: ClaimedSample, started: float) -> Outcome:
        draft = Draft.model_validate_json(sample.payload or b"")
        return await self._judge(place, claim, sample, draft, started)

    async def _judge(
        self, place: Place, claim: Claim, sample: ClaimedSample, draft: Draft, started: float
    ) -> Outcome:
        """Ask the environment for its verdict and end the rollout with it. ``started``: monotonic, of this
        stage's claim.
        """
        begun = time.monotonic()
        failure: GymQueueError | None = None
        verdict = Verdict(reward=None)
        try:
            async with _deadline(place.spec.limits.verify_timeout, "verifying"):
                environment = self._environment(place.example.environment)
                verdict = await _call_verifier(environment, place, draft)
        except Exception as error:  # noqa: BLE001 - the same; its row shows what was to be judged
            failure = _understood(error)
        timings = self._timings(
            claim,
            sample,
            started,
            queued=draft.queued,
            generate=draft.generate,
            verify_queued=_waited(claim, sample) if sample.fence.stage is Stage.VERIFY else None,
            verify=time.monotonic() - begun,
        )
        if failure is not None:
            return self._failed(place, sample, failure, timings, draft)
        return endings.succeeded(place, draft, verdict, timings)

    @staticmethod
    def _timings(claim: Claim, sample: ClaimedSample, started: float, **stages: float | None) -> Timings:
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
        failure_class = error.failure_class
        delay = retry_delay(failure_class, sample.failures + 1, place.spec.limits, jitter=random.random())
        if delay is not None:
            name = rollout_id(place.spec.run_id, place.example_index, place.sample_index)
            _log.info("rollout %s attempt %d: %s; next in %.1f s", name, fence.attempt, error, delay)
            return Retry(delay=delay)
        # An inline verifier may be what failed: the failure's stage is where it happened.
        stage = Stage.VERIFY if draft else fence.stage
        sentence = str(error).encode(errors="replace").decode()  # it may quote what no file can hold
        failure = Failure(failure_class=failure_class, stage=stage, error=sentence)
        return endings.failed(place, failure, fence.attempt, timings, draft)

    async def _commit(self, fence: Fence, outcome: Outcome, patience: float) -> None:
        """Write the outcome, and publish what follows. A ledger that is away is waited for, ``patience``
        seconds: while the claim can be ours.
        """
        pause, give_up = 0.1, time.monotonic() + patience
        while True:
            try:
                receipt = await self._ledger.commit(fence, outcome)
                break
            except LedgerError:
                if time.monotonic() > give_up:
                    raise
                await asyncio.sleep(pause * random.random())
                pause = min(2 * pause, _LONGEST_PAUSE)
        if receipt.ticket is not None:
            await self._publisher.publish([receipt.ticket])
        elif not receipt.accepted and not isinstance(outcome, Retry):
            _log.warning("late write refused: %s is not the newest attempt", fence)


def _waited(claim: Claim, sample: ClaimedSample) -> float:
    """Return how long a sample waited for its worker, in seconds."""
    return max(0.0, claim.claimed_at - sample.queued_at)


def _check_readable(sample: ClaimedSample) -> None:
    """Raise ``PayloadLostError`` for an attempt that lacks what it needs."""
    if sample.unreadable:
        raise PayloadLostError(sample.unreadable)


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
    if isinstance(error, PydanticSerializationError):  # half a surrogate pair is what a model cut off writes
        said = f"what was said cannot be written as JSON: {error}"
        return ModelError(said) if "surrogates" in said else EnvironmentFailedError(said)
    _log.error("unexpected error in a rollout", exc_info=error)
    return GymQueueError(f"unexpected {type(error).__name__}: {error}")


def _is_inline(environment: Environment, place: Place) -> bool:
    """Ask where to verify."""
    try:
        return environment.inline(place.example)
    except GymQueueError:
        raise
    except Exception as error:
        msg = f"the environment's inline raised {type(error).__name__}: {error}"
        raise EnvironmentFailedError(msg) from error


async def _call_verifier(environment: Environment, place: Place, draft: Draft) -> Verdict:
    """Call the environment's ``verify``, plain or async; whatever it raises is a failure of the verifier, not
    a reward.
    """
    try:
        answer: object = environment.verify(place.example, draft.trajectory)
        verdict = await answer if inspect.isawaitable(answer) else answer
    except GymQueueError:
        raise
    except Exception as error:
        msg = f"verifier raised {type(error).__name__}: {error}"
        raise VerifierError(msg) from error
    if not isinstance(verdict, Verdict):
        msg = f"verifier returned {type(verdict).__name__} instead of a Verdict"
        raise VerifierError(msg)
    return verdict
