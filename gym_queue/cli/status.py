"""How ``submit-rollouts`` ends, and how it speaks."""

from __future__ import annotations

from contextlib import suppress

import click

PROGRAM = "submit-rollouts"

OK = 0
SOME_FAILED = 1
WRONG_USE = 2
INTERRUPTED = 130


def say(sentence: str) -> None:
    """Tell the user one thing, on stderr and on one line."""
    with suppress(OSError):  # its stderr may go to a disk that is full
        click.echo(f"{PROGRAM}: {' '.join(sentence.split())}", err=True)
