"""What a run was asked to do (``OUT.run/manifest.json``): ``--resume`` continues that and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from gym_queue.api import RunRequest
from gym_queue.durable import replacement, storage_errors
from gym_queue.errors import UsageError
from gym_queue.records import Freshness, Record, RunSpec

if TYPE_CHECKING:
    from pathlib import Path

_NAME = "manifest.json"


class Manifest(Record):
    """Identity of a run: its settings and input (``spec.input_fingerprint``), ``examples`` rows long.

    ``command`` are the arguments of the command as they were given, without ``--resume`` and ``--retry``, and
    ``directory`` is the folder that they were given in; both may change between resumes. ``request`` is what
    the head was asked for: then ``examples`` are those of a mix, or 0 where they are appended. ``head`` is
    where a run is done that is not done here, ``key`` under which it was submitted there; until the head has
    answered, its run id is that key too.
    """

    spec: RunSpec
    examples: int
    command: tuple[str, ...] = ()
    directory: str = ""
    request: RunRequest | None = None
    head: str = ""
    key: str = ""


def write(run_dir: Path, manifest: Manifest) -> None:
    """Write the manifest durably and all at once, creating the folder.

    Raises:
        StorageError: it cannot be written.
    """
    path = run_dir / _NAME
    with storage_errors(f"{path} cannot be written"):
        run_dir.mkdir(parents=True, exist_ok=True)
        with replacement(path) as file:
            file.write(manifest.model_dump_json(indent=2).encode() + b"\n")


def read(run_dir: Path) -> Manifest | None:
    """Return the manifest of an earlier run, or ``None`` if there was none.

    Raises:
        UsageError: it is damaged or from another version of gym_queue.
        StorageError: it cannot be read.
    """
    path = run_dir / _NAME
    with storage_errors(f"{path} cannot be read"):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        msg = f"{path} is damaged or from another version of gym_queue; choose another output file"
        raise UsageError(msg) from error


def differences(old: Manifest, new: Manifest) -> list[str]:
    """Say, a sentence each, what keeps ``new`` from continuing ``old``; nothing if they are the same run."""
    before, after = _settings(old), _settings(new)
    return [
        "the content of the input changed"
        if name == "input_fingerprint"
        else f"{name} was {_shown(before[name])}, now {_shown(after[name])}"
        for name in before
        if before[name] != after[name]
    ]


def _settings(manifest: Manifest) -> dict[str, Any]:
    """Return what identifies a run, flat: what ``RunSpec.identity`` covers."""
    spec = manifest.spec.model_dump(mode="json", exclude={"run_id", "output"})
    freshness = dict.fromkeys(Freshness.model_fields) | (spec.pop("freshness") or {})
    nested = {**spec.pop("sampling"), **spec.pop("limits"), **spec.pop("groups"), **freshness}
    return {**spec, **nested, "examples": manifest.examples}


def _shown(value: object) -> str:
    return "not set" if value is None else str(value)
