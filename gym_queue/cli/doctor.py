"""``gym-queue doctor``: what is wrong here, and what to do about it; ``--quick`` for health checks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from gym_queue.cli import pulse
from gym_queue.cli.configuration import load_settings
from gym_queue.cli.findings import Level

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gym_queue.cli.findings import Finding
    from gym_queue.settings import Settings


@click.command()
@click.option(
    "--quick", is_flag=True, help="Only what a health check asks: that --role, or else Redis, lives."
)
@click.option(
    "--role",
    metavar="ROLE",
    type=click.Choice(pulse.ROLES),
    help=f"What runs on this machine, and must be alive: {', '.join(pulse.ROLES)}.",
)
def doctor(quick: bool, role: str | None) -> None:  # noqa: FBT001
    """Check this machine and what it talks to, a line each, with what to do where something is amiss.

    Exit status: 0 nothing failed, 1 something did.
    """
    failed = False
    for finding in _findings(load_settings(), role, quick=quick):
        click.echo(finding)
        failed |= finding.level is Level.FAIL
    sys.exit(1 if failed else 0)


def _findings(settings: Settings, role: str | None, *, quick: bool) -> Iterator[Finding]:
    if quick or role:
        yield pulse.feel(role or "redis", settings)
    if not quick:
        from gym_queue.cli.checkup import examine  # noqa: PLC0415 - heavier than a health check may be

        yield from examine(settings, role)
