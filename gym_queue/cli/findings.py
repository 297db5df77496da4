"""What ``gym-queue doctor`` finds, and how it looks on a screen."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

import click

if TYPE_CHECKING:
    from collections.abc import Callable


class Level(StrEnum):
    """How bad it is. ``fail``: rollouts cannot be collected, or could be lost."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


_COLOURS = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red"}


class Finding(NamedTuple):
    """One line: what was looked at, how it is, and what to do if it should be otherwise."""

    level: Level
    subject: str
    sentence: str

    def __str__(self) -> str:
        """Return the line; ``click.echo`` takes the colour out where no terminal is."""
        level = click.style(f"{self.level:<4}", fg=_COLOURS[self.level])
        return f"{level}  {self.subject}: {' '.join(self.sentence.split())}"


def says(level: Level, subject: str) -> Callable[[str], Finding]:
    """Return what makes findings of one level on one subject."""
    return lambda sentence: Finding(level, subject, sentence)
