"""A user's own class by name: what is found, how options arrive, and what each mistake is told."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from gym_queue.environments.python import create
from gym_queue.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

_MODULE = """
from gym_queue.environments.base import Environment

class Maze(Environment):
    def __init__(self, **options):
        self.options = options

class Grumpy(Environment):
    def __init__(self, level):
        raise RuntimeError("no mood")

class Stranger:
    pass
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_worlds.py").write_text(_MODULE)
    (tmp_path / "broken_world.py").write_text("x = 1 / 0\n")
    (tmp_path / "hungry_world.py").write_text("import no_such_dependency\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    for name in ("own_worlds", "broken_world", "hungry_world"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_options_arrive_as_json_where_they_are_json() -> None:
    maze = create("python:own_worlds:Maze?size=3&strict=true&names=[1,2]&title=two words")
    options = {"size": 3, "strict": True, "names": [1, 2], "title": "two words"}
    assert vars(maze) == {"options": options}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("python:own_worlds", "expected python:module:Class"),
        ("python::Maze", "expected python:module:Class"),
        ("python:own_world:Maze", "there is no module 'own_world' on the path"),
        ("python:own_worlds.deep:Maze", "there is no module 'own_worlds.deep'"),
        ("python:hungry_world:Maze", "needs 'no_such_dependency', which is not installed"),
        ("python:broken_world:Maze", "importing 'broken_world' raised ZeroDivisionError: division by zero"),
        ("python:own_worlds:Mase", "no environment class in module own_worlds 'Mase'; did you mean Maze"),
        (
            "python:own_worlds:Stranger",
            "Stranger is not a subclass of gym_queue.environments.base.Environment",
        ),
        ("python:own_worlds:Environment", "Environment is not a subclass"),
        ("python:own_worlds:Grumpy?level=3", r"Grumpy\(level=3\) raised RuntimeError: no mood"),
        ("python:own_worlds:Grumpy", "raised TypeError"),
    ],
)
def test_each_mistake_has_its_sentence(name: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        create(name)
