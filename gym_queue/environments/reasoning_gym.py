"""The procedural datasets of the PyPI package reasoning_gym: ``reasoning_gym:DATASET[?key=value&…]``.

Options are fields of the dataset's configuration: ``reasoning_gym:chain_sum?max_terms=3``. Values that are
not plain text or numbers are JSON: ``reasoning_gym:basic_arithmetic?operators=["+","-"]``.

An example travels as a place (dataset, configuration, seed, size, index); its item is rebuilt where it is
needed and scored by the dataset's own scorer. The items of a few datasets (``UNSTABLE``) depend on the
process that builds them, so theirs are built once, in a process with a fixed hash seed, and travel in the
example. A digest in the trajectory's state lets the verifier refuse an item that was rebuilt differently,
instead of scoring the wrong one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
import typing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from gym_queue.environments.base import Environment, Observation, final_text, parse_name
from gym_queue.errors import (
    EnvironmentFailedError,
    InvalidExampleError,
    UsageError,
    VerifierError,
    unknown_name,
)
from gym_queue.records import Example, Message, Trajectory, Verdict
from gym_queue.verification.base import answer_in

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEME = "reasoning_gym"

UNSTABLE = frozenset(
    {
        "codeio",
        "intermediate_integration",
        "isomorphic_strings",
        "knight_swap",
        "list_functions",
        "polynomial_multiplication",
        "ransom_note",
        "word_ladder",
    }
)
"""Datasets whose items differ between processes with one seed: they follow the order of a set of strings, or
draw from the global generator (list_functions). Found by comparing up to 500 items a dataset under two values
of PYTHONHASHSEED."""

_GIVEN_ELSEWHERE = frozenset({"seed", "size"})
_BUILDER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reasoning_gym")
_BUILDING = threading.Lock()  # pool_matrix and list_functions draw from the process's global generators


class _Place(BaseModel):
    """What ``Example.row`` holds: where an item is found, and the item itself for an unstable dataset."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    config: dict[str, Any]
    seed: int
    size: int = Field(ge=1)
    index: int = Field(ge=0)
    entry: dict[str, Any] | None = None


def create(name: str) -> ReasoningGymEnvironment:
    """Return the environment of one dataset. Imports reasoning_gym (about a second, once a process).

    Raises:
        UsageError: unknown dataset or option, or a value that the dataset refuses.
    """
    _, dataset, texts = parse_name(name)
    datasets = _factory().DATASETS
    if dataset not in datasets:
        raise unknown_name(dataset, datasets, kind="reasoning_gym dataset")
    environment = ReasoningGymEnvironment(name, dataset, _read_config(name, datasets[dataset][1], texts))
    environment.probe(size=1, seed=0)
    return environment


class ReasoningGymEnvironment(Environment):
    """One dataset with one configuration (JSON values). See the module's docstring."""

    def __init__(self, name: str, dataset: str, config: dict[str, Any]) -> None:
        self._name = name
        self._dataset = dataset
        self._config = config
        members = {dataset} | {
            member["name"] for member in config.get("datasets", ())
        }  # composite names others
        self._stable = UNSTABLE.isdisjoint(members)

    def inline(self, example: Example) -> bool:
        """Never: scorers run sympy, searches and simulations of any length."""
        return False

    def probe(self, size: int, seed: int) -> None:
        """Make the dataset, but no item, to see that its configuration is taken.

        Raises:
            UsageError: it is not.
        """
        try:
            _dataset(self._dataset, _canonical(self._config), seed, size)
        except Exception as error:
            msg = f"environment {self._name}: {_sentence(error)}"
            raise UsageError(msg) from error

    def check(self, example: Example) -> None:
        """Refuse an input row that does not name a place in this dataset."""
        try:
            self._place(example)
        except InvalidExampleError as error:
            raise UsageError(str(error)) from error

    def examples(self, size: int, seed: int) -> Iterator[Example]:
        """Yield places, which costs next to nothing; for an unstable dataset the items themselves."""
        self.probe(size, seed)
        entries = iter(()) if self._stable else self._entries(size, seed)
        for index in range(size):
            row = {
                "dataset": self._dataset,
                "config": self._config,
                "seed": seed,
                "size": size,
                "index": index,
            }
            entry = next(entries, None)
            if entry is not None and entry["metadata"].get("source_dataset", self._dataset) in UNSTABLE:
                row["entry"] = entry
            yield Example(id=f"{self._dataset}-{seed}-{index}", environment=self._name, row=row)

    async def reset(self, example: Example, session: dict[str, Any]) -> Observation:
        """Ask the item's question. Building it may take seconds (sokoban): not on the event loop's thread."""
        entry = await asyncio.get_running_loop().run_in_executor(_BUILDER, self._entry, example)
        session["digest"] = _digest(entry)
        return Observation(messages=({"role": "user", "content": entry["question"]},))

    def step(self, example: Example, session: dict[str, Any], message: Message) -> Observation:
        """End the rollout; remember which item was asked."""
        return Observation(done=True, state={"digest": session["digest"]})

    def verify(self, example: Example, trajectory: Trajectory) -> Verdict:
        """Score what the last ``<answer>`` tag holds, else the whole text, with the dataset's scorer."""
        place, entry = self._place(example), self._entry(example)
        if trajectory.state.get("digest") != _digest(entry):
            msg = f"item {example.id} was rebuilt differently here, so its answer cannot be scored"
            raise VerifierError(msg)
        scorer = _dataset(place.dataset, _canonical(place.config), place.seed, place.size)
        try:
            reward = float(scorer.score_answer(answer_in(final_text(trajectory)), entry))
        except Exception as error:
            msg = f"the scorer of {place.dataset} failed: {_sentence(error)}"
            raise VerifierError(msg) from error
        if not math.isfinite(reward):
            msg = f"the scorer of {place.dataset} gave {reward}"
            raise VerifierError(msg)
        return Verdict(reward=reward)

    def _place(self, example: Example) -> _Place:
        try:
            place = _Place.model_validate({"dataset": self._dataset, "config": self._config, **example.row})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            msg = f"the row's {where!r}: {first['msg'].lower()} (needed: seed, size, index)"
            raise InvalidExampleError(msg) from error
        if place.dataset != self._dataset or place.config != self._config:
            msg = f"the row is of dataset {place.dataset} {place.config}, its environment is {self._name}"
            raise InvalidExampleError(msg)
        if place.index >= place.size:
            msg = f"the row's index {place.index} is not below its size {place.size}"
            raise InvalidExampleError(msg)
        if place.dataset in UNSTABLE and place.entry is None:
            msg = f"items of {place.dataset} differ between processes; the row must bring its 'entry'"
            raise InvalidExampleError(msg)
        return place

    def _entry(self, example: Example) -> dict[str, Any]:
        place = self._place(example)
        if place.entry is not None:
            return place.entry
        try:
            return _build(place.dataset, _canonical(place.config), place.seed, place.size, place.index)
        except Exception as error:
            msg = f"{place.dataset} could not build item {place.index}: {_sentence(error)}"
            raise EnvironmentFailedError(msg) from error

    def _entries(self, size: int, seed: int) -> Iterator[dict[str, Any]]:
        """Yield the items as a process with a fixed hash seed builds them: the same in every run."""
        paths = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, "-m", __name__, self._name, str(size), str(seed)]
        surroundings = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": paths}
        with (
            tempfile.TemporaryFile() as noise,
            subprocess.Popen(  # noqa: S603 - our own module
                command, stdout=subprocess.PIPE, stderr=noise, env=surroundings
            ) as builder,
        ):
            try:
                for line in builder.stdout or ():
                    if line.endswith(b"\n"):
                        yield json.loads(line)
                if builder.wait():
                    noise.seek(0)
                    words = noise.read().decode(errors="replace").strip().rpartition("\n")[2]
                    msg = f"building the items of {self._dataset} ended with {builder.returncode}: {words}"
                    raise EnvironmentFailedError(msg)
            finally:
                builder.kill()


def _factory() -> Any:
    return importlib.import_module("reasoning_gym.factory")


def _canonical(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def _digest(entry: dict[str, Any]) -> str:
    """Identify an item by what the model saw and what it is scored by."""
    return hashlib.sha256(json.dumps([entry["question"], entry["answer"]]).encode()).hexdigest()[:16]


def _sentence(error: Exception) -> str:
    """Say what went wrong; the package's own refusals (assertions and value errors) speak for themselves."""
    text = str(error)
    if text and isinstance(error, AssertionError | ValueError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@lru_cache(maxsize=16)
def _dataset(dataset: str, config: str, seed: int, size: int) -> Any:
    """Return the package's dataset object; several, such as word_ladder, load files when they are made."""
    config_class = _factory().DATASETS[dataset][1]
    values = {
        key: _field_type(config_class, key).validate_python(value)
        for key, value in json.loads(config).items()
    }
    return _factory().create_dataset(dataset, seed=seed, size=size, **values)


@lru_cache(maxsize=256)
def _build(dataset: str, config: str, seed: int, size: int, index: int) -> dict[str, Any]:
    """Build an item; the samples of a group ask for the same one."""
    source = _dataset(dataset, config, seed, size)
    with _BUILDING:
        entry: dict[str, Any] = source[index]
    return entry


def _field_type(config_class: type, key: str) -> TypeAdapter[Any]:
    """Return the declared type of a field, widened by its default where it is declared too narrowly."""
    declared = typing.get_type_hints(config_class)[key]
    default = getattr(config_class(), key)
    try:
        TypeAdapter(declared).validate_python(default)
    except ValidationError:
        return TypeAdapter(declared | type(default))
    return TypeAdapter(declared)


def _read_config(name: str, config_class: type, texts: dict[str, str]) -> dict[str, Any]:
    """Read options by the types of the dataset's configuration; return JSON values.

    A value is tried as the text it is, then as JSON: so text needs no quotes, and lists can be given.
    """
    known = {field.name for field in fields(config_class)} - _GIVEN_ELSEWHERE
    config: dict[str, Any] = {}
    for key, text in texts.items():
        if key in _GIVEN_ELSEWHERE:
            msg = f"environment {name}: {key!r} is not an option here; it is given with the run (--{key})"
            raise UsageError(msg)
        if key not in known:
            raise unknown_name(key, known, kind=f"option of {name.partition('?')[0]}")
        adapter = _field_type(config_class, key)
        try:
            config[key] = adapter.dump_python(_read_value(adapter, text), mode="json")
        except ValidationError as error:
            msg = f"environment {name}: {key}={text}: {error.errors()[0]['msg'].lower()}"
            raise UsageError(msg) from error
    return config


def _read_value(adapter: TypeAdapter[Any], text: str) -> Any:
    try:
        return adapter.validate_python(text)
    except ValidationError:
        try:
            decoded = json.loads(text)
        except ValueError:
            decoded = None
        if decoded is None and text != "null":
            raise
    return adapter.validate_python(decoded)


def _print_items(name: str, size: int, seed: int) -> None:
    """Print items as JSON lines: what ``_entries`` starts as a process of its own."""
    _, dataset, texts = parse_name(name)
    config = _canonical(_read_config(name, _factory().DATASETS[dataset][1], texts))
    lines = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # some generators print
        for index in range(size):
            random.seed(f"{seed}-{index}")  # what list_functions draws from
            lines.write(json.dumps(_build(dataset, config, seed, size, index)) + "\n")
            lines.flush()


if __name__ == "__main__":
    _print_items(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
