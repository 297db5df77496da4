"""``gym-queue runs failures`` and ``runs retry``: what a run could not do, and another try."""

from __future__ import annotations

import asyncio
import os
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gym_queue.cli.configuration import load_settings
from gym_queue.cli.flags import AS_JSON, classes
from gym_queue.cli.lookup import files_of, is_path, look_up
from gym_queue.cli.rows import DeadLetter, lines_of, read, stream
from gym_queue.cli.status import OPERATOR, PROGRAM, say
from gym_queue.cli.wording import columns, cut
from gym_queue.coordinator.rows import CANCELLED
from gym_queue.errors import StorageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gym_queue.cli.lookup import Files
    from gym_queue.settings import Settings

_HEAD = ("ROLLOUT", "CLASS", "STAGE", "ATTEMPT", "ERROR")
_SHOWN = 20
_LONGEST_ERROR = 120


class Report:
    """Takes failed rows one by one, counts them, and keeps or prints as many as are to be shown.

    ``wanted`` are the classes to show; with none, all that failed. ``selected`` counts them.
    """

    def __init__(self, wanted: Sequence[str], limit: int | None, *, as_json: bool) -> None:
        self.selected = 0
        self._wanted = wanted
        self._limit = limit
        self._as_json = as_json
        self._by_class: Counter[str] = Counter()
        self._rows: list[tuple[object, ...]] = []

    def add(self, line: bytes, letter: DeadLetter) -> None:
        """Count a row; print it at once where JSON is asked for."""
        name = letter.failure_class or CANCELLED
        selected = name in self._wanted if self._wanted else name != CANCELLED
        if selected or not self._wanted:
            self._by_class[name] += 1
        if not selected:
            return
        self.selected += 1
        if self._limit is not None and self.selected > self._limit:
            return
        if self._as_json:
            click.echo(line)
        else:
            error = cut(letter.error or "", _LONGEST_ERROR)
            self._rows.append((letter.rollout_id, name, letter.stage or "-", letter.attempt, error))

    def lines(self) -> Iterator[str]:
        """Yield the table and the summary."""
        if self._rows:
            yield from columns(_HEAD, self._rows)
        if hidden := self.selected - len(self._rows):
            yield f"… and {hidden:,} more (--limit)"
        failed = [(name, number) for name, number in self._by_class.most_common() if name != CANCELLED]
        by_class = ", ".join(f"{number:,} by {name}" for name, number in failed)
        total = sum(number for _, number in failed)
        said = [f"{total:,} failed" + (f" ({by_class})" if failed else "")]
        if cancelled := self._by_class[CANCELLED]:
            said.append(f"{cancelled:,} cancelled")
        yield ", ".join(said)


@click.command()
@click.argument("run")
@click.option(
    "--class", "wanted", callback=classes, metavar="CLASS[,CLASS...]", help="Only failures of these classes."
)
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    metavar="N",
    help="Show no more than so many.  [default: 20; with --json all]",
)
@AS_JSON
def failures(run: str, wanted: Sequence[str], limit: int | None, as_json: bool) -> None:  # noqa: FBT001
    """Show the rollouts of RUN that failed, and how many by class.

    They are read from OUT.failures.jsonl and, while the run stands, from the results not yet written there.
    """
    shown = limit if as_json or limit is not None else _SHOWN
    report = Report(wanted, shown, as_json=as_json)
    asyncio.run(_collect(load_settings(), run, report))
    if not as_json:
        for line in report.lines():
            click.echo(line)


async def _collect(settings: Settings, run: str, report: Report) -> None:
    async with look_up(settings, run) as subject:
        # The stream first: a row leaves it only when it is in the file, so none is missed.
        fresh = {}
        if subject.ledger is not None and subject.status is not None:
            async for event in stream(subject.ledger, subject.run_id):
                if event.summary.state != "succeeded":
                    letter = DeadLetter.model_validate_json(event.row)
                    fresh[letter.rollout_id] = (event.row, letter)
        if subject.files is not None:
            _read_file(subject.files, report, fresh)
        elif subject.status is not None and subject.status.archived:
            where = subject.status.spec.output or "the run's output"
            say(f"what is archived already is in {where}, which cannot be read from here", OPERATOR)
        for line, letter in fresh.values():
            report.add(line, letter)


def _read_file(files: Files, report: Report, fresh: dict[str, tuple[bytes, DeadLetter]]) -> None:
    path = files.paths.failures
    for line in lines_of(path):
        letter = read(DeadLetter, line, path)
        fresh.pop(letter.rollout_id, None)
        report.add(line, letter)


@click.command()
@click.argument("run")
@click.option(
    "--class",
    "wanted",
    callback=classes,
    required=True,
    metavar="CLASS[,CLASS...]",
    help="Which failures to try again.",
)
def retry(run: str, wanted: Sequence[str]) -> None:
    """Do again what failed of RUN: its submit-rollouts command with --resume --retry CLASS.

    The rows of those failures are dropped from OUT.failures.jsonl; all other rows stay.
    """
    files = files_of(Path(run)) if is_path(run) else asyncio.run(_files_of_id(load_settings(), run))
    if files.coordinated:
        msg = f"{files.paths.rows} is being written: a run is tried again when its coordinator is done"
        raise UsageError(msg)
    report = Report(wanted, 0, as_json=False)
    _read_file(files, report, {})
    if not report.selected:
        names = " or ".join(wanted)
        click.echo(f"nothing to do: {files.paths.failures} has no row of class {names}")
        return
    submit(files, ("--resume", "--retry", ",".join(wanted)))


async def _files_of_id(settings: Settings, run_id: str) -> Files:
    async with look_up(settings, run_id) as subject:
        if subject.files is None:
            where = subject.status.spec.output if subject.status else ""
            msg = f"run {run_id} can be tried again only where its output is: {where or 'nobody knows where'}"
            raise UsageError(msg)
        return subject.files


def submit(files: Files, flags: Sequence[str]) -> None:
    """Become the command that the run was submitted with, with further flags, in its directory."""
    from gym_queue.cli.submit import main  # noqa: PLC0415 - only this command needs it

    arguments = (*files.manifest.command, *flags)
    directory = files.manifest.directory
    say(f"in {directory}: {shlex.join((PROGRAM, *arguments))}", OPERATOR)
    try:
        os.chdir(directory)
    except OSError as error:
        msg = f"the run was submitted in {directory}, which cannot be entered: {error.strerror}"
        raise StorageError(msg) from error
    main.main(list(arguments), prog_name=PROGRAM)
