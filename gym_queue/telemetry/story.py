"""Whose life a process is busy with: what log lines carry, and what numbers and spans are made of.

A context variable holds it, so each asyncio task and each thread that was started for it has its own, and
whatever is said meanwhile, by an engine or an environment too, carries its name.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from gym_queue.records import Fence, Summary, Ticket, Usage, rollout_id

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import TracebackType

_Result = TypeVar("_Result")
_NOTHING = nullcontext()


class Step(NamedTuple):
    """A part of an attempt: from when to when (``time.monotonic()``), and the error that ended it, if any."""

    name: str
    begin: float
    end: float
    error: str


@dataclass(slots=True, eq=False)
class Story:
    """One attempt in this process, from its claim on, for those who want to know (else nobody writes one).

    Args:
        fence: which attempt.
        accepted_at, queued_at, claimed_at: Unix seconds on the ledger's clock.
        began: ``time.monotonic()`` at ``claimed_at``.
        steps: what it did, in the order in which that ended.
        outcome: ``generated`` (its verification is queued), ``succeeded``, ``failed``, ``retried``,
            ``refused`` (it was no longer the newest attempt), ``lost`` (the ledger took no outcome) or
            ``stopped`` (it was taken away, or the worker ended).
        summary: of a rollout that it ended.
        usage: tokens that the engine counted, if it generated.
    """

    fence: Fence
    accepted_at: float
    queued_at: float
    claimed_at: float
    began: float = field(default_factory=time.monotonic)
    steps: list[Step] = field(default_factory=list)
    outcome: str = "stopped"
    summary: Summary | None = None
    usage: Usage | None = None

    @property
    def waited(self) -> float:
        """Seconds in the queue."""
        return max(0.0, self.claimed_at - self.queued_at)


class Observer(Protocol):
    """Who wants to know of attempts."""

    def observe(self, story: Story) -> None:
        """Take note of an attempt that is over. Called on the pipeline's event loop: be quick."""
        ...


Subject = Story | Fence | Ticket | str | None
"""An attempt, a ticket, or the id of a run."""

_subject: ContextVar[Subject] = ContextVar("gym_queue_subject", default=None)


class about:  # noqa: N801 - used as a function; a generator would cost each rollout a microsecond more
    """Let what is said in the block, and by tasks that it starts, be about this."""

    __slots__ = ("_subject", "_token")

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def __enter__(self) -> None:
        self._token = _subject.set(self._subject)

    def __exit__(self, *_: object) -> None:
        _subject.reset(self._token)


def speak_of(subject: Subject) -> None:
    """Let all that this task says from now on, and tasks that it starts, be about this."""
    _subject.set(subject)


def outside(work: Coroutine[Any, Any, _Result]) -> asyncio.Task[_Result]:
    """Start work for all, whoever happens to be the first to need it: what it says is about nobody."""
    context = copy_context()
    context.run(_subject.set, None)
    return asyncio.create_task(work, context=context)


def step(name: str) -> AbstractContextManager[Any]:
    """Let the block be a step of the attempt that this is about, if there is one whose steps are kept."""
    story = _subject.get()
    return _Step(story, name) if isinstance(story, Story) else _NOTHING


class _Step:
    __slots__ = ("_begin", "_name", "_story")

    def __init__(self, story: Story, name: str) -> None:
        self._story = story
        self._name = name

    def __enter__(self) -> None:
        self._begin = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure = kind.__name__ if kind else ""
        self._story.steps.append(Step(self._name, self._begin, time.monotonic(), failure))


def spent(usage: Usage) -> None:
    """Note what the engine counted for the attempt that this is about."""
    if isinstance(story := _subject.get(), Story):
        story.usage = usage


def names() -> dict[str, str | int]:
    """Return what a log line carries: ``run_id``, ``rollout_id``, ``attempt``, ``stage``, ``worker``, as far
    as they are known.
    """
    subject = _subject.get()
    match subject:
        case None:
            return {}
        case str():
            return {"run_id": subject}
        case Ticket():
            return {"run_id": subject.run_id, "attempt": subject.attempt, "stage": subject.stage.value}
    fence = subject.fence if isinstance(subject, Story) else subject
    found: dict[str, str | int] = {
        "run_id": fence.run_id,
        "rollout_id": rollout_id(fence.run_id, fence.example_index, fence.sample_index),
        "attempt": fence.attempt,
        "stage": fence.stage.value,
    }
    return found | {"worker": fence.worker} if fence.worker else found
