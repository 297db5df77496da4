"""One run on an embedded stack, from flags to files and an exit status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import sys
from functools import partial
from typing import TYPE_CHECKING

import click

from gym_queue import assembly
from gym_queue.cli.burial import bury_as_they_die, hand_back_of_the_dead, leased
from gym_queue.cli.configuration import load_settings
from gym_queue.cli.interrupts import Interrupts
from gym_queue.cli.job import prepare
from gym_queue.cli.progress import open_view
from gym_queue.cli.status import INTERRUPTED, OK, PROGRAM, SOME_FAILED, WRONG_USE, say
from gym_queue.cli.summary import summary
from gym_queue.coordinator.metrics import write_metrics
from gym_queue.coordinator.run import Cancelled, Coordinator, Interrupted
from gym_queue.coordinator.sidework import beside
from gym_queue.embedded.stack import EmbeddedStack
from gym_queue.errors import GymQueueError, LedgerError, StorageError, UsageError
from gym_queue.maintenance.cancel import cancel_run
from gym_queue.telemetry.logging import configure
from gym_queue.telemetry.secrets import secrets_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gym_queue.celery_app import CeleryBroker
    from gym_queue.cli.job import Job
    from gym_queue.cli.options import Options
    from gym_queue.cli.progress import View
    from gym_queue.coordinator.metrics import RunMetrics
    from gym_queue.embedded.stack import Death
    from gym_queue.ledger.base import Ledger
    from gym_queue.settings import Settings

_log = logging.getLogger(__name__)

_REDRAW_INTERVAL = 0.5


def execute(options: Options) -> int:
    """Run to the end and return the exit status.

    Raises:
        GymQueueError: no rollout was started; the sentence says why.
    """
    settings = load_settings(concurrency=options.concurrency, head_server_url=options.head)
    level = settings.log_level if "log_level" in settings.model_fields_set else "WARNING"
    configure(level, PROGRAM, form=settings.log_format, secrets=secrets_of(settings))
    job = prepare(options, settings)
    with job.archive:
        try:
            metrics, cancelled = _collect(job)
            job.archive.finalize()
            _write_metrics(job, metrics, complete=not cancelled)
        except (Interrupted, asyncio.CancelledError, KeyboardInterrupt):
            say(f"interrupted; {_close_early(job)}")
            return INTERRUPTED
        except GymQueueError as error:
            if not job.started:
                raise
            if job.head and isinstance(error, UsageError):  # with this input there is no going on
                say(f"{error}; {_kept(job)}")
                return WRONG_USE
            say(f"{error}; {_close_early(job)}")
            return SOME_FAILED
    for folder in ("redis", "payloads"):  # all they knew is in the files now
        shutil.rmtree(job.paths.run_dir / folder, ignore_errors=True)
    for line in summary(metrics, job.paths):
        click.echo(line)
    if cancelled:
        rest = "" if job.head else f". Do what was never begun with: {job.options.continuation}"
        say(f"cancelled: {_kept(job)}{rest}")
    return SOME_FAILED if cancelled or metrics.rollouts.failed or metrics.rollouts.cancelled else OK


def _close_early(job: Job) -> str:
    """Write the metrics so far, if that is possible, and say what there is and how to go on."""
    try:
        _write_metrics(job, job.metrics.snapshot(), complete=False)
    except StorageError as error:
        _log.info("no metrics of the unfinished run: %s", error)  # the files they come from are what counts
    there = f"the run goes on at {job.head}; " if job.head and job.started else ""
    return f"{there}nothing that had ended is lost: {_kept(job)}. Go on with: {job.options.continuation}"


def _kept(job: Job) -> str:
    files = f"{job.paths.rows} and {job.paths.failures.name}"
    return f"{job.archive.count} of {job.total} rollouts are in {files}"


def _write_metrics(job: Job, metrics: RunMetrics, *, complete: bool) -> None:
    about = {"run_id": job.spec.run_id, "model": job.spec.model, "samples": job.spec.samples}
    write_metrics(job.paths.metrics, metrics, {**about, "complete": complete})


def _collect(job: Job) -> tuple[RunMetrics, bool]:
    """Do what is left to do; return the metrics, and whether the run was cancelled meanwhile."""
    if job.archive.count == job.total:
        job.started = True
        if "redis_url" in job.settings.model_fields_set and not job.head:
            asyncio.run(_forget(job))
        return job.metrics.snapshot(accepted=job.total), False
    if job.head:
        return _collect_from_head(job)
    work = f"{job.source.count} examples x {job.spec.samples} samples with {job.spec.model}"
    own = job.options.workers or job.options.verifiers
    where = f"logs are in {job.paths.run_dir / 'logs'}" if own else "no worker is started here"
    say(f"{work}; {where}")
    try:
        return asyncio.run(_run(job)), False
    except Cancelled:
        return job.metrics.snapshot(accepted=job.archive.count), True


def _collect_from_head(job: Job) -> tuple[RunMetrics, bool]:
    from gym_queue.cli import following  # noqa: PLC0415 - aiohttp loads slowly

    try:
        return following.collect(job), False
    except Cancelled:
        return job.metrics.snapshot(accepted=job.archive.count), True


async def _forget(job: Job) -> None:
    """Let a ledger that others use forget a run that is complete: its coordinator may have died before it
    did.
    """
    try:
        async with _connected(job.settings) as (ledger, _):
            await ledger.forget_run(job.spec.run_id)
    except LedgerError as error:
        _log.warning("the ledger may still know run %s: %s", job.spec.run_id, error)


async def _run(job: Job) -> RunMetrics:
    """Bring the stack up, run, and take it down."""
    options, run_dir = job.options, job.paths.run_dir
    with Interrupts() as interrupts:
        async with (
            EmbeddedStack(
                job.settings,
                run_dir,
                workers=options.workers,
                verifiers=options.verifiers,
                fresh=not options.resume,
            ) as stack,
            _connected(stack.settings) as (ledger, publisher),
        ):
            deaths: asyncio.Queue[Death] = asyncio.Queue()
            watch = stack.supervise(deaths.put_nowait, job.metrics.ended_on_its_own)
            burials = bury_as_they_die(deaths, ledger, publisher, stack.could_start)
            async with beside(watch, burials) as during:
                await during(
                    hand_back_of_the_dead(ledger, publisher, stack.pids if stack.own_redis else None)
                )
                await during(stack.wait_ready(partial(leased, ledger)))
                view = open_view(sys.stderr, job.total, job.archive.count)
                coordinator = Coordinator(
                    ledger=ledger,
                    publisher=publisher,
                    spec=job.spec,
                    source=job.source,
                    archive=job.archive,
                    metrics=job.metrics,
                    window=job.settings.window,
                    on_progress=view.update,
                    cancel=partial(cancel_run, ledger, job.spec.run_id, "the run was cancelled"),
                )
                interrupts.gently = partial(_wind_down, coordinator, view, job.settings.shutdown_grace)
                job.started = True
                with contextlib.closing(view):
                    async with beside(_redraw(view)):
                        return await during(coordinator.run())


def _wind_down(coordinator: Coordinator, view: View, grace: float) -> None:
    view.note(f"interrupted; rollouts in flight have {grace:g} s to end (Ctrl-C again stops at once)")
    coordinator.interrupt(grace)


async def _redraw(view: View) -> None:
    while True:
        await asyncio.sleep(_REDRAW_INTERVAL)
        view.refresh()


@contextlib.asynccontextmanager
async def _connected(settings: Settings) -> AsyncIterator[tuple[Ledger, CeleryBroker]]:
    ledger = assembly.make_ledger(settings)
    publisher = assembly.make_broker(settings)
    try:
        yield ledger, publisher
    finally:
        await publisher.close()
        await ledger.close()
