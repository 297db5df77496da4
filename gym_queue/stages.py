"""What is done in each stage of a rollout. Whatever happens there has a class and becomes an ``Outcome``.

Nothing here speaks to the ledger: ``pipeline`` claims before, and commits the outcome afterwards.
"""

from __future__ import annotations

import inspect
import logging
import random
import time
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticSerializationError

from gym_queue import endings
from gym_queue.agents.loop import act
from gym_queue.deadline import Deadline
from gym_queue.endings import Draft, Place
from gym_queue.errors import (
    EnvironmentFailedError,
    GymQueueError,
    ModelError,
    PayloadLostError,
    StaleError,
    VerifierError,
)
from gym_queue.ledger.base import Generated, Outcome, Retry
from gym_queue.lifecycle import retry_delay
from gym_queue.records import Failure, Stage, Timings, Verdict
from gym_queue.telemetry.story import spent, step

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gym_queue.engines.base import Engine
    from gym_queue.environments.base import Environment
    from gym_queue.ledger.base import Claim, ClaimedSample
    from gym_queue.records import Limits, RunSpec, Trajectory, Weights

_log = logging.getLogger(__name__)


def longest(stage: Stage, limits: Limits) -> float:
    """Return how many seconds a stage may take, storing its outcome included: the lease of its claim.

    An environment whose ``verify`` is inline is asked in the first stage, after its session was closed, which
    is given the time of one call. The worker itself ends each of these in time; the sweep is the backstop.
    """
    seconds = limits.verify_timeout + limits.store_timeout
    if stage is Stage.GENERATE:
        seconds += limits.generate_timeout + limits.tool_timeout
    return seconds


class Stages:
    """The work of one worker's attempts; many at once.

    Args:
        engine: gives the engine of a model; the same object each time.
        environment: gives the environment of a name; the same object each time.
        newest: gives the newest weights that were announced for a run's model.
        watch: told how many seconds a verifier has, and ``None`` when it is done. Plain code cannot be ended
            from inside its process; whoever can do it from outside learns here when to.
    """

    def __init__(
        self,
        engine: Callable[[str], Awaitable[Engine]],
        environment: Callable[[str], Environment],
        newest: Callable[[RunSpec], Awaitable[Weights | None]],
        watch: Callable[[float | None], object] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._environment = environment
        self._newest = newest
        self._watch = watch

    async def outcome(self, spec: RunSpec, claim: Claim, sample: ClaimedSample, left: float) -> Outcome:
        """Return what became of an attempt.

        Args:
            spec: its run.
            claim: what was claimed.
            sample: which of it is meant.
            left: seconds that the whole rollout still has.
        """
        fence = sample.fence
        work = _Work(
            place=Place(
                spec=spec,
                example=claim.example,
                example_index=fence.example_index,
                sample_index=fence.sample_index,
            ),
            claim=claim,
            sample=sample,
            left=left,
        )
        stage = self._generate if fence.stage is Stage.GENERATE else self._verify
        try:
            _check_readable(sample)
            return await stage(work)
        except Exception as error:  # noqa: BLE001 - an environment or an engine may raise anything
            waited = {"queued": work.waited} if fence.stage is Stage.GENERATE else {}
            return work.failed(_understood(error), work.timings(**waited))

    async def _generate(self, work: _Work) -> Outcome:
        spec, place = work.place.spec, work.place
        with step(doing := "generating"):
            async with work.deadline(spec.limits.generate_timeout, doing):
                engine = await self._engine(spec.model)
                if work.weights is not None:
                    await engine.load(work.weights)
                environment = self._environment(place.example.environment)
                inline = _is_inline(environment, place)
                ordinal = place.example_index * spec.samples + place.sample_index
                trajectory = await act(place.example, environment, engine, spec, ordinal=ordinal)
        spent(trajectory.usage)
        _log.debug("generated: %d turns, %s", trajectory.turns, trajectory.finish_reason)
        draft = Draft(
            attempt=work.sample.fence.attempt,
            trajectory=trajectory,
            queued=work.waited,
            generate=work.elapsed(),
        )
        if stale := await self._stale(work, trajectory):
            timings = work.timings(queued=draft.queued, generate=draft.generate)
            return work.failed(stale, timings, draft)
        if inline:
            return await self._judge(work, draft)
        return Generated(payload=draft.model_dump_json().encode())

    async def _stale(self, work: _Work, trajectory: Trajectory) -> StaleError | None:
        """Tell whether it was sampled by weights that are too old for its run by now."""
        spec = work.place.spec
        if spec.freshness is None:
            return None
        newest, oldest = await self._newest(spec), _oldest(trajectory, work.weights)
        allowed = spec.freshness.max_staleness
        if newest is None or oldest >= newest.version - allowed:
            return None
        return StaleError(
            f"weights of version {oldest} sampled it, and when it was done the newest were of version "
            f"{newest.version}: more than max_staleness ({allowed}) ahead"
        )

    async def _verify(self, work: _Work) -> Outcome:
        return await self._judge(work, Draft.model_validate_json(work.sample.payload or b""))

    async def _judge(self, work: _Work, draft: Draft) -> Outcome:
        """Ask the environment for its verdict and end the rollout with it."""
        place, begun = work.place, work.elapsed()
        try:
            with step(doing := "verifying"):
                deadline = work.deadline(place.spec.limits.verify_timeout, doing)
                self._watch(deadline.seconds)
                environment = self._environment(place.example.environment)
                found: Verdict | GymQueueError = await _call_verifier(environment, place, draft, deadline)
        except Exception as error:  # noqa: BLE001 - the same; its row shows what was to be judged
            found = _understood(error)
        finally:
            self._watch(None)
        timings = work.timings(
            queued=draft.queued,
            generate=draft.generate,
            verify_queued=work.waited if work.sample.fence.stage is Stage.VERIFY else None,
            verify=work.elapsed() - begun,
        )
        if isinstance(found, GymQueueError):  # an inline verifier's too: its stage is where it happened
            return work.failed(found, timings, draft, Stage.VERIFY)
        return endings.succeeded(place, draft, found, timings)


class _Work:
    """One attempt: what was claimed, and its clock, which starts now. ``left``: see ``Stages.outcome``."""

    def __init__(self, place: Place, claim: Claim, sample: ClaimedSample, left: float) -> None:
        self.place = place
        self.sample = sample
        self.weights = claim.weights
        self.waited = max(0.0, claim.claimed_at - sample.queued_at)
        self._claimed_at = claim.claimed_at
        self._left = left
        self._started = time.monotonic()

    def elapsed(self) -> float:
        """Return seconds since the attempt began."""
        return time.monotonic() - self._started

    def deadline(self, seconds: float, doing: str) -> Deadline:
        """Return what strikes after ``seconds``, or when the whole rollout has had its time."""
        left = self._left - self.elapsed()
        if left < seconds:
            total = self.place.spec.limits.rollout_timeout
            whole = f"the rollout was not done {total:g} s (rollout_timeout) after it was accepted"
            return Deadline(left, whole)
        return Deadline(seconds, f"{doing} took longer than {seconds:g} s")

    def timings(self, **stages: float | None) -> Timings:
        """Put this stage's length on the ledger's clock, which the claim was stamped with."""
        return Timings(
            accepted_at=self.sample.accepted_at, ended_at=self._claimed_at + self.elapsed(), **stages
        )

    def failed(
        self, error: GymQueueError, timings: Timings, draft: Draft | None = None, stage: Stage | None = None
    ) -> Outcome:
        """Decide between another attempt and the end, as a failure of ``stage``, else of the fence's."""
        place, fence, failures = self.place, self.sample.fence, self.sample.failures + 1
        failure_class = error.failure_class
        sentence = str(error).encode(errors="replace").decode()  # it may quote what no file can hold
        delay = retry_delay(failure_class, failures, place.spec.limits, jitter=random.random())
        if delay is not None:
            _log.info("the attempt failed: %s; next in %.1f s", sentence, delay)
            return Retry(delay=delay, reason=sentence)
        _log.info("failed as %s: %s", failure_class, sentence)
        failure = Failure(failure_class=failure_class, stage=stage or fence.stage, error=sentence)
        return endings.failed(place, failure, fence.attempt, timings, draft)


def _oldest(trajectory: Trajectory, claimed: Weights | None) -> int:
    """Return the version of the oldest weights that sampled a token; where no token shows it, of those that
    were claimed with it: none older were used.
    """
    tokens = trajectory.tokens
    if tokens is not None and any(tokens.loss_mask):
        masked = zip(tokens.weight_version, tokens.loss_mask, strict=True)
        return min(version for version, is_sampled in masked if is_sampled)
    return claimed.version if claimed is not None else 0


def _check_readable(sample: ClaimedSample) -> None:
    """Raise ``PayloadLostError`` for an attempt that lacks what it needs."""
    if sample.unreadable:
        raise PayloadLostError(sample.unreadable)


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


async def _call_verifier(environment: Environment, place: Place, draft: Draft, deadline: Deadline) -> Verdict:
    """Call the environment's ``verify``, plain or async; whatever it raises is a failure of the verifier, not
    a reward.
    """
    try:
        answer: Any = environment.verify(place.example, draft.trajectory)
        if not isinstance(answer, Verdict) and inspect.isawaitable(answer):
            async with deadline:
                answer = await answer
    except GymQueueError:
        raise
    except Exception as error:
        msg = f"verifier raised {type(error).__name__}: {error}"
        raise VerifierError(msg) from error
    if not isinstance(answer, Verdict):
        msg = f"verifier returned {type(answer).__name__} instead of a Verdict"
        raise VerifierError(msg)
    return answer
