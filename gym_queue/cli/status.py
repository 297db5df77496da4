"""How ``submit-rollouts`` ends, and how it speaks."""

from __future__ import annotations

import click

PROGRAM = "submit-rollouts"

OK = 0
SOME_FAILED = 1
WRONG_USE = 2
INTERRUPTED = 130


def say(sentence: str) -> None:
    """Tell the user one thing, on stderr and on one line."""
    click.echo(f"{PROGRAM}: {' '.join(sentence.split())}", err=True)
