"""What a user asked ``submit-rollouts`` for, checked as far as that goes without looking at anything."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gym_queue.cli.status import PROGRAM
from gym_queue.coordinator.rows import RETRYABLE_ROWS
from gym_queue.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Options:
    """The flags. ``command`` are the arguments as they were typed, ``given`` the flags among them by name."""

    input: Path | None
    model: str
    samples: int
    output: Path
    environment: str | None
    size: int | None
    resume: bool
    head: str | None
    limit: int | None
    concurrency: int | None
    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None
    priority: int
    workers: int
    verifiers: int
    retry: str | None = None
    command: tuple[str, ...] = ()
    given: frozenset[str] = frozenset()

    def check(self) -> None:
        """Refuse flags that do not go together.

        Raises:
            UsageError: one sentence.
        """
        if self.input is not None and self.size is not None:
            msg = "--size is for an environment's own examples; INPUT is shortened with --limit"
            raise UsageError(msg)
        if self.retry is not None and not self.resume:
            msg = "--retry is for output that is there: give --resume as well"
            raise UsageError(msg)
        for name in self.retry_classes:
            if name not in RETRYABLE_ROWS:
                raise unknown_name(name, RETRYABLE_ROWS, kind="failure class")

    @property
    def retry_classes(self) -> tuple[str, ...]:
        """The failure classes of which rollouts shall be done again."""
        return () if self.retry is None else tuple(name.strip() for name in self.retry.split(","))

    @property
    def plain_command(self) -> tuple[str, ...]:
        """The arguments as they were typed, but for those that say how to deal with earlier output."""
        kept, arguments = [], iter(self.command)
        for argument in arguments:
            if argument == "--retry":
                next(arguments, None)
            elif argument != "--resume" and not argument.startswith("--retry="):
                kept.append(argument)
        return tuple(kept)

    @property
    def continuation(self) -> str:
        """The command line that goes on where this one stopped, ready for a shell."""
        return shlex.join((PROGRAM, *self.plain_command, "--resume"))
