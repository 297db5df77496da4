"""Finds whom to ask about a run or a rollout: a ledger that knows it, and its files on this machine."""

from __future__ import annotations

import asyncio
import platform
import re
import shlex
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gym_queue import assembly
from gym_queue.cli.status import OPERATOR, PROGRAM, say
from gym_queue.coordinator import manifest
from gym_queue.coordinator.archive import is_being_written, paths
from gym_queue.embedded.redis import address_of
from gym_queue.errors import LedgerError, StackError, StorageError, UsageError, unknown_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gym_queue.coordinator.archive import OutputPaths
    from gym_queue.coordinator.manifest import Manifest
    from gym_queue.ledger.base import Ledger
    from gym_queue.records import RunSpec, RunStatus
    from gym_queue.settings import Settings


class Files(NamedTuple):
    """A run's output on this machine."""

    paths: OutputPaths
    manifest: Manifest

    @property
    def coordinated(self) -> bool | None:
        """Whether a coordinator is at work on the run; ``None`` where that cannot be seen."""
        return is_being_written(self.paths.run_dir)

    @property
    def continuation(self) -> str:
        """The command that goes on with the run, for a shell in ``manifest.directory``."""
        return shlex.join((PROGRAM, *self.manifest.command, "--resume"))


class Place(NamedTuple):
    """Which rollout is meant."""

    run_id: str
    example_index: int
    sample_index: int


@dataclass(frozen=True)
class Subject:
    """A run, and who knows of it: a ledger that it stands in, its files, or both.

    ``headed``: the run is a head's (``gym_queue.head``), of which nobody asks whether a coordinator is at
    work: whoever leads the heads is. ``waiting_for`` is a sentence while such a run cannot begin.
    """

    run_id: str
    settings: Settings
    ledger: Ledger | None = None
    status: RunStatus | None = None
    files: Files | None = None
    headed: bool = False
    waiting_for: str | None = None

    @property
    def examples(self) -> int | None:
        """How many examples the run has; ``None`` where its files cannot be seen."""
        return self.files.manifest.examples if self.files else None

    @property
    def coordinated(self) -> bool | None:
        """Whether a coordinator is at work on the run; ``None`` where that cannot be seen."""
        return None if self.headed or self.files is None else self.files.coordinated

    def standing(self) -> tuple[Ledger, RunStatus]:
        """Return the ledger that the run stands in, and what it says.

        Raises:
            UsageError: there is none.
        """
        if self.ledger is None or self.status is None:
            msg = (
                f"no Redis that can be reached knows run {self.run_id}: it has ended, its own stack is down, "
                "or GYM_QUEUE_REDIS_URL is needed to find it"
            )
            raise UsageError(msg)
        return self.ledger, self.status


def place_of(rollout: str) -> Place:
    """Read a rollout id.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"(.+)\.(\d+)\.(\d+)", rollout, flags=re.ASCII)
    if found is None:
        msg = f"{rollout!r} is no rollout id: RUN.EXAMPLE.SAMPLE, the rollout_id in the output's rows"
        raise UsageError(msg)
    return Place(found[1], int(found[2]), int(found[3]))


def files_of(out: Path) -> Files:
    """Find the files of the run that writes ``out``.

    Raises:
        UsageError: no run does.
        StorageError: they cannot be read.
    """
    where = paths(out)
    found = manifest.read(where.run_dir)
    if found is None:
        msg = f"{out} is no output of submit-rollouts: there is no {where.run_dir / 'manifest.json'}"
        raise UsageError(msg)
    return Files(where, found)


def _files_here(spec: RunSpec) -> Files | None:
    """Find a run's files by what its spec says (``HOST:PATH``), if that is this machine."""
    host, _, path = spec.output.partition(":")
    if not path or host != platform.node():
        return None
    try:
        found = files_of(Path(path))
    except (UsageError, StorageError):
        return None
    return found if found.manifest.spec.run_id == spec.run_id else None


def is_path(run: str) -> bool:
    """Tell whether RUN is the path of an output, not the id of a run."""
    return "/" in run or run.endswith(".jsonl") or paths(Path(run)).run_dir.is_dir()


@asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[Ledger]:
    """Open the ledger that the settings name, once its Redis has answered.

    Raises:
        StackError: it does not, or does not let us in.
    """
    from gym_queue.embedded.preflight import check_redis  # noqa: PLC0415 - redis-py loads slowly

    await asyncio.to_thread(check_redis, settings.redis_url)
    ledger = assembly.make_ledger(settings)
    try:
        yield ledger
    finally:
        await ledger.close()


def with_redis_of(settings: Settings, output: Path | None) -> Settings:
    """Return the settings with the Redis of the stack that writes ``output``, if one is named.

    Raises:
        UsageError: that stack is down, or there is no such run.
    """
    if output is None:
        return settings
    found = _that_knows(settings, files_of(output))
    if found is None:
        msg = f"the stack of {output} is down, and GYM_QUEUE_REDIS_URL names no other"
        raise UsageError(msg)
    return found


def _that_knows(settings: Settings, files: Files) -> Settings | None:
    """Return settings for where the run may stand: the Redis of its own stack while that is up, or else the
    shared one, if one was named.
    """
    own = address_of(files.paths.run_dir.absolute() / "redis")
    if own is not None:
        return settings.model_copy(update={"redis_url": own})
    return settings if "redis_url" in settings.model_fields_set else None


@asynccontextmanager
async def look_up(settings: Settings, run: str, output: Path | None = None) -> AsyncIterator[Subject]:
    """Find a run by its id or by the path of its output; with ``output`` by both.

    Raises:
        UsageError, StackError, LedgerError: nobody who can be reached knows it.
    """
    if output is None and not is_path(run):
        async with _in_ledger(settings, run) as subject:
            yield subject
        return
    files = files_of(output or Path(run))
    run_id = files.manifest.spec.run_id
    if output is not None and run != run_id:
        msg = f"{output} belongs to run {run_id}, not to {run}"
        raise UsageError(msg)
    async with AsyncExitStack() as stack:
        subject = Subject(run_id, settings, files=files)
        if there := _that_knows(settings, files):
            try:
                ledger = await stack.enter_async_context(connected(there))
                subject = Subject(run_id, there, ledger, await ledger.run(run_id), files)
            except (StackError, LedgerError) as error:
                say(f"{error}; what follows is from the files alone", OPERATOR)
        yield subject


@asynccontextmanager
async def _in_ledger(settings: Settings, run_id: str) -> AsyncIterator[Subject]:
    async with AsyncExitStack() as stack:
        try:
            ledger = await stack.enter_async_context(connected(settings))
        except StackError as error:
            if "redis_url" in settings.model_fields_set:
                raise
            msg = f"{str(error).rstrip('.')}; set GYM_QUEUE_REDIS_URL, or give the path of the run's output"
            raise UsageError(msg) from error
        status = await ledger.run(run_id)
        if status is None:
            known = [run.spec.run_id for run in await ledger.runs()]
            hint = "one that has ended is found by the path of its output only (for a rollout: --output)"
            msg = f"{unknown_name(run_id, known, kind='run')}; {hint}"
            raise UsageError(msg)
        yield Subject(run_id, settings, ledger, status, _files_here(status.spec))
