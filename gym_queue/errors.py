"""One tree of errors: the class says which boundary failed, ``retryable`` whether another try can help.

The docstring of a class is its message where the raiser has nothing more precise to say.
"""

from __future__ import annotations

from typing import ClassVar

from gym_queue.records import FailureClass


class GymQueueError(Exception):
    """gym_queue failed."""

    retryable: ClassVar[bool] = False
    failure_class: ClassVar[FailureClass] = FailureClass.INFRASTRUCTURE

    def __str__(self) -> str:
        return super().__str__() or (type(self).__doc__ or "")


class UsageError(GymQueueError):
    """The command or the input is wrong; nothing was started."""

    failure_class = FailureClass.INVALID


class ConflictError(GymQueueError):
    """The same idempotency key was used with another body."""

    failure_class = FailureClass.INVALID


class LedgerError(GymQueueError):
    """The ledger (Redis) could not be reached or did not answer."""

    retryable = True


class BrokerError(GymQueueError):
    """The broker did not take a ticket."""

    retryable = True


class StorageError(GymQueueError):
    """The archive could not be written."""

    retryable = True


class StackError(GymQueueError):
    """A part of the embedded stack did not start or died."""


class ModelError(GymQueueError):
    """The model's answer cannot be used (wrong request, refused, malformed): the same request would fail again."""

    failure_class = FailureClass.MODEL


class EngineUnavailableError(GymQueueError):
    """The engine could not be reached or is overloaded; another try may work."""

    retryable = True


class EngineSetupError(GymQueueError):
    """The engine cannot serve this run at all (no such model, no chat template)."""

    failure_class = FailureClass.INVALID


class EnvironmentFailedError(GymQueueError):
    """The environment raised."""

    failure_class = FailureClass.ENVIRONMENT


class EnvironmentUnavailableError(GymQueueError):
    """The environment's server could not be reached; another try may work."""

    retryable = True


class VerifierError(GymQueueError):
    """The verifier could not say; that is not a reward of 0."""

    failure_class = FailureClass.VERIFIER


class StageTimeoutError(GymQueueError):
    """A stage ran past its deadline."""

    failure_class = FailureClass.TIMEOUT


class InvalidExampleError(GymQueueError):
    """The example lacks what its environment or verifier needs."""

    failure_class = FailureClass.INVALID
