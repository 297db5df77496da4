"""The folder of one run of the head: what lies where, and what is wished of the run.

``RUNS_DIR/RUN`` holds ``examples.jsonl`` and ``examples.index`` (``inbox``), ``rollouts.jsonl`` with all that
belongs to it (``archive.paths``; manifest and ``progress.json`` are in ``rollouts.run``), and small files
that say what is wished (``paused``, ``cancelled``) and what the run waits for (``waiting``). A wish is a
file, so that it outlives every process, and a Redis that forgets. All methods block; any process may call
them.
"""

from __future__ import annotations

import os
import secrets
import shutil
from typing import TYPE_CHECKING, NamedTuple

from gym_queue.coordinator import inbox, manifest, progress
from gym_queue.coordinator.archive import paths
from gym_queue.coordinator.example_rows import ExampleRows
from gym_queue.coordinator.inbox import AppendedSource, Inbox
from gym_queue.coordinator.mix import MixSource
from gym_queue.durable import storage_errors, sync_directory, temporary_of
from gym_queue.errors import UsageError
from gym_queue.records import RunState

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gym_queue.api import RunRequest
    from gym_queue.coordinator.inbox_index import Standing
    from gym_queue.coordinator.manifest import Manifest
    from gym_queue.coordinator.progress import Written
    from gym_queue.coordinator.source import Source
    from gym_queue.environments.base import Environment

_OUTPUT = "rollouts.jsonl"
_PAUSED = "paused"
_CANCELLED = "cancelled"
_WAITING = "waiting"

UNFINISHED = ".new-"
"""What the name of a folder begins with while a run is being made."""


class RunFiles(NamedTuple):
    """What a run's folder says: how far its output is, and its input; what is wished of it (``open``,
    ``paused`` or ``cancelled``); what it waits for, ``None``: for nothing that is known.
    """

    written: Written
    input: Standing
    wish: RunState
    waiting_for: str | None


class RunFolder:
    """The folder of one run. See the module's docstring. Methods raise ``StorageError``.

    Attributes:
        paths: of the output.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.paths = paths(path / _OUTPUT)

    def make(self, plan: Manifest) -> bool:
        """Make the folder, all at once and durably. Returns false if another did."""
        with storage_errors(f"{self.path} cannot be created"):
            new = self.path.with_name(f"{UNFINISHED}{self.path.name}-{secrets.token_hex(4)}")
            try:
                manifest.write(paths(new / _OUTPUT).run_dir, plan)
                sync_directory(new)
                new.rename(self.path)
            except OSError:
                shutil.rmtree(new, ignore_errors=True)
                if self.exists():
                    return False
                raise
            sync_directory(self.path.parent)
        return True

    def exists(self) -> bool:
        """Tell whether there is such a run."""
        return self.path.is_dir()

    def manifest(self) -> Manifest | None:
        """Return what was asked for, ``None`` where there is no such run. Raises ``UsageError`` if it is
        damaged.
        """
        return manifest.read(self.paths.run_dir)

    def files(self) -> RunFiles:
        """Read how the run stands: some small files."""
        written = progress.read(self.paths.run_dir)
        return RunFiles(written, inbox.standing(self.path), self.wish(), self._waiting_for())

    def written(self) -> Written:
        """Read how far the output is."""
        return progress.read(self.paths.run_dir)

    def wish(self) -> RunState:
        """Return what is wished of the run: ``cancelled`` for good, else ``paused``, else ``open``."""
        with storage_errors(f"{self.path} cannot be read"):
            if (self.path / _CANCELLED).exists():
                return RunState.CANCELLED
            return RunState.PAUSED if (self.path / _PAUSED).exists() else RunState.OPEN

    def set_wish(self, wish: RunState) -> None:
        """Wish, durably, that the run is ``open``, ``paused`` or ``cancelled``. The last is for good."""
        path = self.path / (_CANCELLED if wish is RunState.CANCELLED else _PAUSED)
        with storage_errors(f"{path} cannot be written"):
            if wish is RunState.OPEN:
                path.unlink(missing_ok=True)
            else:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))
            sync_directory(self.path)

    def set_waiting_for(self, sentence: str | None) -> None:
        """Say what the run waits for before it can go on. The one that leads says so; it is not synced."""
        path = self.path / _WAITING
        with storage_errors(f"{path} cannot be written"):
            if sentence is None:
                path.unlink(missing_ok=True)
            else:
                temporary = temporary_of(path)
                temporary.write_text(sentence)
                temporary.replace(path)

    def inbox(self, request: RunRequest, environments: Callable[[str], Environment]) -> Inbox:
        """Return what appends to the run's input. Raises ``UsageError``: its environment is not there."""
        return Inbox(self.path, ExampleRows(request.environment, environments))

    def source(self, request: RunRequest, environments: Callable[[str], Environment]) -> Source:
        """Return the run's input. Raises ``UsageError``: an environment is not there, or refuses."""
        if request.environments:
            return MixSource(request.environments, environments)
        return AppendedSource(self.path, ExampleRows(request.environment, environments))

    def _waiting_for(self) -> str | None:
        with storage_errors(f"{self.path} cannot be read"):
            try:
                return (self.path / _WAITING).read_text() or None
            except FileNotFoundError:
                return None


def request_of(plan: Manifest) -> RunRequest:
    """Return what the head was asked for. Raises ``UsageError`` for a run that is not the head's."""
    if plan.request is None:
        msg = f"run {plan.spec.run_id} was not submitted to a head"
        raise UsageError(msg)
    return plan.request
