"""How our commands end, and how they speak."""

from __future__ import annotations

import click

PROGRAM = "submit-rollouts"
OPERATOR = "gym-queue"

OK = 0
SOME_FAILED = 1
WRONG_USE = 2
INTERRUPTED = 130


def say(sentence: str, program: str = PROGRAM) -> None:
    """Tell the user one thing, on stderr and on one line."""
    click.echo(f"{program}: {' '.join(sentence.split())}", err=True)
