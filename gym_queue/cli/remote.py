"""A run of ``submit-rollouts`` that a head's fleet shall do: what is looked at here, and what is sent."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gym_queue import assembly
from gym_queue.api import MixPart, RunRequest
from gym_queue.coordinator.source import JsonlSource
from gym_queue.environments.base import Environment
from gym_queue.errors import UsageError
from gym_queue.records import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gym_queue.cli.options import Options
    from gym_queue.coordinator.source import Source
    from gym_queue.records import Example, RunSpec
    from gym_queue.settings import Settings

_ROWS = "rows"
_OURS = ("workers", "verifiers", "concurrency", "retry")


class _OfTheHead(Environment):
    """An environment that may be installed where the head is, and not here: there, rows are checked."""


@dataclass(frozen=True)
class Brought:
    """Examples that an environment brings where the head is (a ``coordinator.source.Source``)."""

    name: str
    size: int
    seed: int
    closed = True

    @property
    def count(self) -> int:
        """Number of examples."""
        return self.size

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what chooses them."""
        chosen = ["brought", self.name, self.size, self.seed]
        return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()

    def examples(self, start: int) -> Iterator[Example]:
        """Yield nothing: they are not made here."""
        yield from ()


def check(options: Options) -> None:
    """Refuse flags that are about work on this machine.

    Raises:
        UsageError: one sentence.
    """
    for name in _OURS:
        if name in options.given:
            msg = (
                f"--{name} is for work on this machine; leave it out, or leave out --head and HEAD_SERVER_URL"
            )
            raise UsageError(msg)
    if options.size is not None and options.limit is not None:
        msg = "--limit is for INPUT here: an environment at the head brings --size examples"
        raise UsageError(msg)


def open_source(options: Options) -> Source:
    """Look at the input as far as that can be done without the head's environments.

    Raises:
        UsageError: it cannot be used.
    """
    name = options.environment or _ROWS
    if options.input is not None:
        return JsonlSource(
            options.input, default_environment=name, environments=_environment, limit=options.limit
        )
    if options.environment is None or options.size is None:
        msg = "give an INPUT file, or --environment and --size for an environment's own examples"
        raise UsageError(msg)
    return Brought(name, options.size, options.seed or 0)


def limits(settings: Settings) -> Limits:
    """Return the limits that were set here; the head has its own for the others."""
    return Limits(**_set(settings))


def request(options: Options, settings: Settings, spec: RunSpec, source: Source) -> RunRequest:
    """Return what is asked of the head."""
    brought: tuple[MixPart, ...] = ()
    if isinstance(source, Brought):
        brought = (MixPart(name=source.name, size=source.size, seed=source.seed),)
    return RunRequest(
        model=spec.model,
        samples=spec.samples,
        sampling=spec.sampling,
        limits=_set(settings),
        priority=spec.priority,
        environment=options.environment or _ROWS,
        environments=brought,
    )


def rows(source: Source, start: int) -> Iterator[dict[str, Any]]:
    """Yield the examples from index ``start`` on as rows of an input file, each with its id. Blocks."""
    for example in source.examples(start):
        yield {"id": example.id, "environment": example.environment, **example.row, **example.extra}


def _environment(name: str) -> Environment:
    return assembly.make_environment(name) if name == _ROWS else _OfTheHead()


def _set(settings: Settings) -> dict[str, Any]:
    return {
        name: getattr(settings, name) for name in Limits.model_fields if name in settings.model_fields_set
    }
