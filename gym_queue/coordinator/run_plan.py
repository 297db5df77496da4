"""From a request to what the run is to be: everything is looked at before anything is written."""

from __future__ import annotations

import hashlib
import json
import platform
import secrets
import time
from typing import TYPE_CHECKING

from gym_queue.coordinator.example_rows import ExampleRows
from gym_queue.coordinator.groups import Groups
from gym_queue.coordinator.limits import limits_of
from gym_queue.coordinator.manifest import Manifest
from gym_queue.coordinator.mix import MixSource
from gym_queue.coordinator.run_folder import RunFolder
from gym_queue.errors import GymQueueError, UsageError
from gym_queue.records import RunSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gym_queue.api import RunRequest
    from gym_queue.environments.base import Environment
    from gym_queue.settings import Settings

_MOST = {"samples": 10_000, "priority": 1_000_000}
"""What no honest run exceeds, and what ledger and memory bear."""

_MOST_PARTS = 1_000
_MOST_EXAMPLES = 100_000_000


def digest_of(request: RunRequest) -> str:
    """Digest of what was asked for; equal for equal requests."""
    content = json.dumps(request.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def plan(
    request: RunRequest, settings: Settings, folder: Path, environments: Callable[[str], Environment]
) -> Manifest:
    """Return what a new run in ``folder`` is to be. Blocks: a mix may have to make its first examples.

    Raises:
        UsageError: the request cannot be used; one sentence says why.
    """
    _check_sizes(request)
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    examples, fingerprint = _input(request, environments)
    spec = RunSpec(
        run_id=run_id,
        model=request.model,
        samples=request.samples,
        sampling=request.sampling,
        limits=limits_of(settings, request.limits),
        priority=request.priority,
        weight=request.weight,
        groups=request.groups,
        freshness=request.freshness,
        input_fingerprint=fingerprint,
        output=f"{platform.node()}:{RunFolder(folder / run_id).paths.rows.absolute()}",
    )
    Groups(spec, RunFolder(folder / run_id).paths.run_dir)  # refuses a policy that cannot be met
    manifest = Manifest(spec=spec, examples=examples, request=request)
    _check_written(manifest)
    return manifest


def _check_sizes(request: RunRequest) -> None:
    for name, most in _MOST.items():
        if abs(getattr(request, name)) > most:
            msg = f"{name} may be {most:,} at most"
            raise UsageError(msg)
    if len(request.environments) > _MOST_PARTS:
        msg = f"a mix may have {_MOST_PARTS:,} environments at most"
        raise UsageError(msg)
    if sum(part.size for part in request.environments) > _MOST_EXAMPLES:
        msg = f"a mix may have {_MOST_EXAMPLES:,} examples at most"
        raise UsageError(msg)


def _input(request: RunRequest, environments: Callable[[str], Environment]) -> tuple[int, str]:
    """Look at the run's environments; return how many examples it brings, and their fingerprint."""
    try:
        if request.environments:
            mix = MixSource(request.environments, environments)
            return mix.count, mix.fingerprint
        ExampleRows(request.environment, environments)
    except GymQueueError:
        raise
    except Exception as error:  # an environment is anybody's code
        msg = f"an environment of the run raised {type(error).__name__}: {error}"
        raise UsageError(msg) from error
    return 0, ""


def _check_written(manifest: Manifest) -> None:
    """Refuse what could not be read again: numbers that are none, halves of letters."""
    try:
        same = Manifest.model_validate_json(manifest.model_dump_json().encode()) == manifest
    except ValueError:
        same = False
    if not same:
        msg = "the request has numbers that are infinite, or text that is not Unicode"
        raise UsageError(msg)
