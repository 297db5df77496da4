"""``gym-queue up``: the whole service on this machine, until it is told to stop."""

from __future__ import annotations

from pathlib import Path

import click

_COUNT = click.IntRange(min=0)
PATTERNS = ("all-in-one", "separated")


@click.command()
@click.option(
    "--pattern",
    type=click.Choice(PATTERNS),
    metavar="PATTERN",
    default="all-in-one",
    show_default=True,
    help="all-in-one: the head is in this process; separated: it is one of its own, as all else.",
)
@click.option(
    "--workers",
    metavar="N",
    type=_COUNT,
    default=1,
    show_default=True,
    help="Worker processes that generate.",
)
@click.option(
    "--verifiers",
    metavar="N",
    type=_COUNT,
    default=1,
    show_default=True,
    help="Worker processes that verify.",
)
@click.option(
    "--folder",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/up"),
    show_default=True,
    help="Where Redis keeps its data, and the logs are.",
)
@click.pass_context
def up(context: click.Context, pattern: str, workers: int, verifiers: int, folder: Path) -> None:
    """Bring up head, workers, beat and Redis on this machine, and start again what dies.

    Their logs are shown, each line behind the name of its part. With GYM_QUEUE_REDIS_URL set, that Redis is
    used instead of one of its own. Ctrl-C or SIGTERM stops all parts in order, and what is in flight has
    GYM_QUEUE_SHUTDOWN_GRACE seconds to end; a second one stops them at once.

    Exit status: 0 stopped in order, 2 something could not be started, 130 stopped at once.
    """
    from gym_queue.cli.service import Plan, serve  # noqa: PLC0415 - heavy: not for --help

    plan = Plan(embedded=pattern == PATTERNS[0], workers=workers, verifiers=verifiers, folder=folder)
    context.exit(serve(plan))
