"""``make chaos``: the scenarios in full, seed after seed, until the time is over."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import signal
import time
from pathlib import Path

import click

from tests.chaos import network
from tests.chaos.scenarios import SCENARIOS, Size, run

_FOLDER = Path("runs/chaos")


@click.command()
@click.option("--seed", type=int, default=1, show_default=True, help="The first seed.")
@click.option("--minutes", type=float, default=10.0, show_default=True, help="Start nothing new after these.")
@click.option(
    "--scenario", type=click.Choice(sorted(SCENARIOS)), multiple=True, help="Only this one (repeatable)."
)
def main(seed: int, minutes: float, scenario: tuple[str, ...]) -> None:
    """Play scenarios of chaos; exit with 1 if one went wrong. Logs of those are kept."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or a cable and frozen processes would be left
    deadline, failed = time.monotonic() + 60.0 * minutes, []
    if missing := network.why_not():
        click.echo(f"no cable is cut: {missing}")
    possible = [name for name in scenario or SCENARIOS if not (missing and name == "cut_off")]
    for number, name in ((number, name) for number in itertools.count(seed) for name in possible):
        if time.monotonic() > deadline:
            break
        folder = (_FOLDER / f"{name}-{number}").absolute()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            report = asyncio.run(run(name, folder, number, Size.FULL))
        except AssertionError as error:
            click.echo(f"{error}\n")
            failed.append(
                f"{name}: make chaos SEED={number} SCENARIO={name} MINUTES=0.1  (its logs: {folder})"
            )
        else:
            noted = "; ".join(report.noted or [f"{report.seconds:.0f} s"])
            click.echo(f"seed {number}: {name} is well: {noted}")
            shutil.rmtree(folder)
    if failed:
        click.echo("\n".join(["went wrong; to see it again:", *failed]))
        raise SystemExit(1)


if __name__ == "__main__":
    main()
