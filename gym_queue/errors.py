"""One tree of errors: the class says which boundary failed, and its failure class whether another
try can help (``lifecycle.RETRYABLE``).

The docstring of a class is its message where the raiser has nothing more precise to say.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, ClassVar, Self

from gym_queue.records import FailureClass

if TYPE_CHECKING:
    from collections.abc import Iterable


class GymQueueError(Exception):
    """gym_queue failed."""

    failure_class: ClassVar[FailureClass] = FailureClass.INFRASTRUCTURE

    def __str__(self) -> str:
        return super().__str__() or (type(self).__doc__ or "")


class UsageError(GymQueueError):
    """The command or the input is wrong; nothing was started."""

    failure_class = FailureClass.INVALID


class UnknownRunError(UsageError):
    """There is no such run."""


class ConflictError(GymQueueError):
    """The same idempotency key was used with another body."""

    failure_class = FailureClass.INVALID

    @classmethod
    def of_key(cls, idempotency_key: str, run_id: str) -> Self:
        """Return the error of a key that was used for a run of another identity."""
        return cls(
            f"idempotency key {idempotency_key!r} was used for run {run_id} with other input or settings"
        )


class HeadAwayError(GymQueueError):
    """The head cannot be reached; it may in a moment."""


class HeadFailedError(GymQueueError):
    """The head failed, or what answers is no head."""


class UnauthorizedError(GymQueueError):
    """The head does not take this token."""

    failure_class = FailureClass.INVALID


class NotFoundError(GymQueueError):
    """The head knows nothing of that name."""

    failure_class = FailureClass.INVALID


class RequestRefusedError(GymQueueError):
    """The head does not take this request; the same one would be refused again."""

    failure_class = FailureClass.INVALID


class ExamplesRefusedError(RequestRefusedError):
    """An example cannot be used."""


class ServerAwayError(GymQueueError):
    """No healthy server of that name can be reached."""


class ServerBrokeOffError(GymQueueError):
    """The server broke off in the middle of a request, which it may have done or not."""


class LedgerError(GymQueueError):
    """The ledger (Redis) could not be reached or did not answer."""


class BrokerError(GymQueueError):
    """The broker did not take a ticket."""


class PayloadLostError(GymQueueError):
    """A payload that was kept beside the ledger is gone or damaged."""


class PayloadsNotSharedError(GymQueueError):
    """This process cannot see the payloads that the ledger refers to."""


class StorageError(GymQueueError):
    """The archive could not be written."""


class DiskFullError(StorageError):
    """There is no room for the archive; waiting for some helps."""


REDIS_DISK_FULL = (
    "Redis takes no more writes, because it cannot write its append-only file (is its disk full?)"
)
REDIS_FULL = "Redis takes nothing new, because it has no room (see its maxmemory)"


def redis_refusal(message: str) -> str | None:
    """Return one sentence for an error of Redis that passes when there is room again, else ``None``.

    It is told by its text: as the error of a command inside a script, it comes wrapped in others.
    """
    if "MISCONF" in message:
        return REDIS_DISK_FULL
    if "maxmemory" in message:
        return REDIS_FULL
    return None


class StackError(GymQueueError):
    """A part of the embedded stack did not start or died."""


class RedisAwayError(StackError):
    """The Redis that was named does not answer; it may in a moment."""


class ModelError(GymQueueError):
    """The model's answer cannot be used (wrong, refused, malformed): the same request would fail again."""

    failure_class = FailureClass.MODEL


class EngineUnavailableError(GymQueueError):
    """The engine could not be reached or is overloaded; another try may work."""


class EngineSetupError(GymQueueError):
    """The engine cannot serve this run at all (no such model, no chat template)."""

    failure_class = FailureClass.INVALID


class EnvironmentFailedError(GymQueueError):
    """The environment raised."""

    failure_class = FailureClass.ENVIRONMENT


class EnvironmentUnavailableError(GymQueueError):
    """The environment's server could not be reached; another try may work."""


class VerifierError(GymQueueError):
    """The verifier could not say; that is not a reward of 0."""

    failure_class = FailureClass.VERIFIER


class StageTimeoutError(GymQueueError):
    """A stage ran past its deadline."""

    failure_class = FailureClass.TIMEOUT


class WorkerStoodStillError(GymQueueError):
    """The worker stood still past a deadline: whose time it was cannot be told."""


class StaleError(GymQueueError):
    """The weights that sampled the rollout are too old."""

    failure_class = FailureClass.STALE


class InvalidExampleError(GymQueueError):
    """The example lacks what its environment or verifier needs."""

    failure_class = FailureClass.INVALID


def unknown_name(name: str, known: Iterable[str], *, kind: str) -> UsageError:
    """Return the error for a name that nobody knows; it shows the near ones, or all where none is near."""
    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    few = 10
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif 0 < len(names) <= few:
        hint = f"there are: {', '.join(names)}"
    else:
        hint = f"none of the {len(names)} known ones is near" if names else "there are none"
    return UsageError(f"there is no {kind} {name!r}; {hint}")
