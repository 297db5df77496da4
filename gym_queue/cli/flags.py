"""Flags that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gym_queue.coordinator.rows import RETRYABLE_ROWS
from gym_queue.errors import unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    _Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

OF_STACK: _Decorator = click.option(
    "-o",
    "--output",
    metavar="OUT.jsonl",
    type=click.Path(path_type=Path),
    help="Ask the stack of the run that writes this file, not GYM_QUEUE_REDIS_URL.",
)
OF_RUN: _Decorator = click.option(
    "-o",
    "--output",
    metavar="OUT.jsonl",
    type=click.Path(path_type=Path),
    help="The run's output: its own stack is asked, or the files if that is down.",
)
AS_JSON: _Decorator = click.option(
    "--json", "as_json", is_flag=True, help="One JSON object a line, for scripts."
)


def _print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:  # noqa: FBT001
    if wanted:
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - slow, seldom needed

        try:
            click.echo(f"gym-queue {version('gym-queue')}")
        except PackageNotFoundError:  # run from a source tree
            click.echo("gym-queue, not installed")
        context.exit()


VERSION: _Decorator = click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version.",
)


def classes(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[str, ...]:
    """Read a list of failure classes, ``infrastructure,timeout``; none where the flag is not given.

    Raises:
        UsageError: a class is unknown; the sentence names the near ones.
    """
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    for name in names:
        if name not in RETRYABLE_ROWS:
            raise unknown_name(name, RETRYABLE_ROWS, kind="failure class")
    return tuple(dict.fromkeys(names))
