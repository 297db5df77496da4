"""``gym-queue runs``: list runs, look at one, and stop or steer it."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import click

from gym_queue import assembly
from gym_queue.cli.configuration import load_settings
from gym_queue.cli.failures import failures, retry
from gym_queue.cli.flags import AS_JSON, OF_STACK
from gym_queue.cli.lookup import connected, look_up, with_redis_of
from gym_queue.cli.rows import lines_of
from gym_queue.cli.wording import columns, count, cut
from gym_queue.errors import UsageError
from gym_queue.maintenance.cancel import cancel_run
from gym_queue.maintenance.publication import offer_waiting
from gym_queue.records import RunState

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gym_queue.cli.lookup import Files, Subject
    from gym_queue.records import RunStatus
    from gym_queue.settings import Settings

_HEAD = (
    *("RUN", "STATE", "ACCEPTED", "ENDED", "SUCCEEDED", "FAILED", "CANCELLED", "IN FLIGHT", "QUEUED"),
    *("MODEL", "OUTPUT"),
)
_HEALED = ("retried", "lost", "refused", "republished", "dropped")
_LONGEST_MODEL = 40


@click.group(invoke_without_command=True)
@OF_STACK
@AS_JSON
@click.pass_context
def runs(context: click.Context, output: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """List the runs that have not ended, highest priority first; or look at one, or steer it."""
    if context.invoked_subcommand is not None:
        if output or as_json:
            msg = f"--output and --json are for the list, not for runs {context.invoked_subcommand}"
            raise UsageError(msg)
        return
    standing = asyncio.run(_standing(load_settings(), output))
    for line in _as_json(standing) if as_json else table(standing):
        click.echo(line)


runs.add_command(failures)
runs.add_command(retry)


@runs.command()
@click.argument("run")
def show(run: str) -> None:
    """Show all that is known of RUN."""
    for line in asyncio.run(_show(load_settings(), run)):
        click.echo(line)


@runs.command()
@click.argument("run")
def cancel(run: str) -> None:
    """End RUN for good: nothing new starts, and every open rollout ends as cancelled."""
    click.echo(asyncio.run(_cancel(load_settings(), run)))


@runs.command()
@click.argument("run")
def pause(run: str) -> None:
    """Start nothing new of RUN. What is in flight goes on, and what was generated is verified."""
    click.echo(asyncio.run(_pause(load_settings(), run)))


@runs.command()
@click.argument("run")
def resume(run: str) -> None:
    """Go on with RUN where it was paused."""
    click.echo(asyncio.run(_resume(load_settings(), run)))


async def _standing(settings: Settings, output: Path | None) -> list[RunStatus]:
    async with connected(with_redis_of(settings, output)) as ledger:
        return await ledger.runs()


def _as_json(standing: list[RunStatus]) -> Iterator[str]:
    for run in standing:
        facts = {"run_id": run.spec.run_id, "in_flight": run.in_flight, "ended": run.ended}
        yield json.dumps(facts | run.model_dump(mode="json"))


def table(standing: list[RunStatus]) -> Iterator[str]:
    """Yield the lines that list runs."""
    if not standing:
        yield "no runs"
        return
    rows = [
        (
            *(run.spec.run_id, run.state.value, run.accepted, run.ended),
            *(run.succeeded, run.failed, run.cancelled, run.in_flight, run.queued),
            *(cut(run.spec.model, _LONGEST_MODEL), run.spec.output or "-"),
        )
        for run in standing
    ]
    yield from columns(_HEAD, rows)


async def _show(settings: Settings, run: str) -> list[str]:
    async with look_up(settings, run) as subject:
        facts = _facts(subject)
    width = max(map(len, facts))
    return [f"{name:<{width}}  {fact}" for name, fact in facts.items() if fact]


def _facts(subject: Subject) -> dict[str, str]:
    files, status = subject.files, subject.status
    rows = _rows(files) if files and status is None else (0, 0)
    spec = status.spec if status else files.manifest.spec if files else None
    facts = {"run": subject.run_id, "state": _state(subject, sum(rows))}
    if spec is not None:
        examples = f"{files.manifest.examples:,} examples x " if files else ""
        limits = spec.limits
        facts |= {
            "model": spec.model,
            "work": f"{examples}{count(spec.samples, 'sample')}, priority {spec.priority}",
            "output": str(files.paths.rows.absolute()) if files else spec.output,
            "limits": f"{limits.max_attempts} attempts; generate {limits.generate_timeout:g} s, "
            f"verify {limits.verify_timeout:g} s",
        }
    if status is not None:
        facts |= {
            "accepted": f"{status.accepted:,} (the cursor is at example {status.cursor:,})",
            "ended": f"{status.ended:,}: {status.succeeded:,} succeeded, {status.failed:,} failed, "
            f"{status.cancelled:,} cancelled; {status.archived:,} are archived",
            "open": f"{status.in_flight:,} in flight, {status.queued:,} queued",
            "healed": ", ".join(f"{getattr(status, name):,} {name}" for name in _HEALED),
        }
    elif files is not None:
        if not files.coordinated and sum(rows) < _total(files):
            facts["go on with"] = f"(in {files.manifest.directory}) {files.continuation}"
        facts["rows"] = f"{rows[0]:,} succeeded, {rows[1]:,} failed or cancelled, of {_total(files):,}"
    return facts


def _state(subject: Subject, rows: int) -> str:
    """Say what state a run is in, and whether somebody drives it. ``rows`` are what its files hold."""
    files = subject.files
    driven = {True: ", a coordinator is at work", False: ", no coordinator is at work", None: ""}
    who = driven[files.coordinated if files else None]
    if subject.status is not None:
        return f"{subject.status.state}{who}"
    if files is None:
        return ""
    if files.coordinated:
        return f"in no Redis that answers{who}"
    return "ended" if rows == _total(files) else f"broken off{who}"


def _rows(files: Files) -> tuple[int, int]:
    """Return how many rows each of the two files holds."""
    succeeded, failed = (sum(1 for _ in lines_of(path)) for path in (files.paths.rows, files.paths.failures))
    return succeeded, failed


def _total(files: Files) -> int:
    return files.manifest.examples * files.manifest.spec.samples


async def _cancel(settings: Settings, run: str) -> str:
    async with look_up(settings, run) as subject:
        ledger, before = subject.standing()
        if before.state is RunState.ENDED:
            msg = f"run {subject.run_id} has ended"
            raise UsageError(msg)
        cancelled = await cancel_run(ledger, subject.run_id, "gym-queue runs cancel")
    waited = min(before.queued, cancelled)
    return f"cancelled: {waited:,} queued, {cancelled - waited:,} in flight"


async def _pause(settings: Settings, run: str) -> str:
    async with look_up(settings, run) as subject:
        ledger, before = subject.standing()
        if not await ledger.set_run_state(subject.run_id, RunState.PAUSED):
            msg = f"run {subject.run_id} is {before.state}, which is final"
            raise UsageError(msg)
    return f"paused: {before.in_flight:,} in flight go on, {before.queued:,} queued wait"


async def _resume(settings: Settings, run: str) -> str:
    """Open a run again, and publish what waits: workers refused and forgot its tickets meanwhile."""
    async with look_up(settings, run) as subject:
        ledger, before = subject.standing()
        if not await ledger.set_run_state(subject.run_id, RunState.OPEN):
            msg = f"run {subject.run_id} is {before.state}, which is final"
            raise UsageError(msg)
        broker = assembly.make_broker(subject.settings)
        try:
            await offer_waiting(ledger, broker, subject.run_id)
        finally:
            await broker.close()
    idle = subject.files is not None and subject.files.coordinated is False
    note = "; but no coordinator is at work on it: submit-rollouts … --resume goes on" if idle else ""
    return f"resumed: {before.queued:,} queued may start{note}"
