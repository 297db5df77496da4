"""A run that is known to be possible: everything is looked at before anything is started."""

from __future__ import annotations

import platform
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gym_queue import assembly
from gym_queue.cli import remote
from gym_queue.cli.status import say
from gym_queue.coordinator import manifest
from gym_queue.coordinator.archive import Archive, paths
from gym_queue.coordinator.limits import limits_of
from gym_queue.coordinator.manifest import Manifest
from gym_queue.coordinator.metrics import Metrics
from gym_queue.coordinator.source import EnvironmentSource, JsonlSource
from gym_queue.errors import UsageError
from gym_queue.records import RunSpec, Sampling

if TYPE_CHECKING:
    from gym_queue.cli.options import Options
    from gym_queue.coordinator.archive import OutputPaths
    from gym_queue.coordinator.source import Source
    from gym_queue.settings import Settings


@dataclass
class Job:
    """A run that is known to be possible. ``started`` says whether any of it has been fed to workers."""

    options: Options
    settings: Settings
    source: Source
    spec: RunSpec
    archive: Archive
    metrics: Metrics
    manifest: Manifest
    started: bool = False

    @property
    def total(self) -> int:
        """Rollouts of the run."""
        return self.source.count * self.spec.samples

    @property
    def head(self) -> str:
        """The head whose fleet does it; empty: it is done here."""
        return self.manifest.head

    @property
    def paths(self) -> OutputPaths:
        """Where the output is."""
        return self.archive.paths


def prepare(options: Options, settings: Settings) -> Job:
    """Check input, model and earlier output, in this order, and open the output.

    Raises:
        GymQueueError: the run is not possible; nothing was started.
    """
    head = settings.head_server_url
    if head:
        remote.check(options)
        source = remote.open_source(options)
    else:
        _check_fleet(options, settings)
        source = _open_source(options)
        assembly.check_model(options.model, settings)
    earlier = manifest.read(paths(options.output).run_dir) if options.resume else None
    spec = _spec(options, settings, source, earlier)
    now = Manifest(
        spec=spec,
        examples=source.count,
        command=options.plain_command,
        directory=str(Path.cwd()),
        head=head,
        key=(earlier.key if earlier else spec.run_id) if head else "",
    )
    _check_same(options, now, earlier)
    metrics = Metrics(options.samples)
    archive = Archive(options.output, options.samples).open(
        resume=options.resume, retry=options.retry_classes, on_row=metrics.add
    )
    try:
        manifest.write(archive.paths.run_dir, now)
    except BaseException:
        archive.close()
        raise
    for note in archive.notes:
        say(note)
    return Job(options, settings, source, spec, archive, metrics, now)


def _check_fleet(options: Options, settings: Settings) -> None:
    """Refuse a Redis of our own, which nobody else can be using, without workers of our own."""
    missing = [name for name in ("workers", "verifiers") if not getattr(options, name)]
    if missing and "redis_url" not in settings.model_fields_set:
        msg = (
            f"--{missing[0]} 0 leaves that work to workers elsewhere: "
            "set GYM_QUEUE_REDIS_URL to the Redis that they use"
        )
        raise UsageError(msg)


def _open_source(options: Options) -> Source:
    if options.input is not None:
        return JsonlSource(
            options.input,
            default_environment=options.environment or "rows",
            environments=assembly.make_environment,
            limit=options.limit,
        )
    if options.environment is None or options.size is None:
        msg = "give an INPUT file, or --environment and --size for an environment's own examples"
        raise UsageError(msg)
    return EnvironmentSource(
        assembly.make_environment(options.environment),
        options.environment,
        size=options.size,
        seed=options.seed or 0,
        limit=options.limit,
    )


def _spec(options: Options, settings: Settings, source: Source, earlier: Manifest | None) -> RunSpec:
    new_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    return RunSpec(
        run_id=earlier.spec.run_id if earlier else new_id,
        model=options.model,
        samples=options.samples,
        sampling=Sampling(
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=options.max_tokens,
            seed=options.seed,
        ),
        limits=remote.limits(settings) if settings.head_server_url else limits_of(settings),
        priority=options.priority,
        input_fingerprint=source.fingerprint,
        output=f"{platform.node()}:{options.output.absolute()}",
    )


def _check_same(options: Options, now: Manifest, earlier: Manifest | None) -> None:
    if not options.resume:
        return
    where = paths(options.output)
    if earlier is None:
        if any(path.exists() and path.stat().st_size for path in (where.rows, where.failures)):
            msg = f"{where.rows} cannot be continued: {where.run_dir} does not say what run it belongs to"
            raise UsageError(msg)
        return
    if bool(earlier.head) != bool(now.head):
        msg = (
            f"{where.rows} is of a run at the head {earlier.head}: continue it with --head {earlier.head}"
            if earlier.head
            else f"{where.rows} is of a run on this machine: continue it without --head and HEAD_SERVER_URL"
        )
        raise UsageError(msg)
    if different := manifest.differences(earlier, now):
        msg = f"{where.rows} cannot be continued with these settings: {'; '.join(different)}"
        raise UsageError(msg)
