"""Rows of input: one JSON object a line becomes an example, or a sentence says why it cannot."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from gym_queue.errors import UsageError
from gym_queue.records import Example

if TYPE_CHECKING:
    from collections.abc import Callable

    from gym_queue.environments.base import Environment

DEEPEST = 100
"""Lists and objects in each other. pydantic writes no more than 255, some of which records add."""

_OURS = frozenset({"id", "environment"})


class ExampleRows:
    """Makes examples of rows: ``{"id"?, "environment"?, …}``; the rest is read by the row's environment.

    A row without ``id`` is called ``row-LINE``. Fields that are not the environment's go to
    ``Example.extra``.

    Args:
        default_environment: for rows that name none.
        environments: returns the environment of a name, or raises ``UsageError``. Called once a name.

    Raises:
        UsageError: there is no such default environment.
    """

    def __init__(self, default_environment: str, environments: Callable[[str], Environment]) -> None:
        self._default = default_environment
        self._find = environments
        self._known: dict[str, Environment] = {}
        self._environment(default_environment)

    def example(self, number: int, row: dict[str, Any]) -> Example:
        """Make an example of the row of line ``number``.

        Raises:
            UsageError: the row cannot be used; the sentence does not name the line.
        """
        name = row.get("environment")
        if name is None:
            name = self._default
        elif not isinstance(name, str):
            msg = f"'environment' must be a name, not {json.dumps(name)}"
            raise UsageError(msg)
        environment = self._environment(name)
        wanted = environment.row_fields
        rest = {key: value for key, value in row.items() if key not in _OURS}
        example = Example(
            id=id_of(row, number),
            environment=name,
            row={key: value for key, value in rest.items() if wanted is None or key in wanted},
            extra={key: value for key, value in rest.items() if wanted is not None and key not in wanted},
        )
        environment.check(example)
        return example

    def _environment(self, name: str) -> Environment:
        if name not in self._known:
            self._known[name] = self._find(name)
        return self._known[name]


def id_of(row: dict[str, Any], number: int) -> str:
    """Return the id of the row of line ``number``. Raises ``UsageError``."""
    identity = row.get("id")
    if identity is None:
        return f"row-{number}"
    if isinstance(identity, bool) or not isinstance(identity, str | int | float) or identity == "":
        msg = f"'id' must be text or a number, not {json.dumps(identity)}"
        raise UsageError(msg)
    return str(identity)


def parse(line: bytes) -> dict[str, Any]:
    """Read a line as a JSON object that can be written as JSON in UTF-8 again. Raises ``UsageError``."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"not UTF-8 (byte {error.start + 1} of the line: {error.reason})"
        raise UsageError(msg) from error
    try:
        row = json.loads(text, parse_constant=_no_number, parse_float=_finite)
        if "\\ud" in text.lower():
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        msg = "not JSON text (half of a surrogate pair)"
        raise UsageError(msg) from error
    except json.JSONDecodeError as error:
        msg = f"not JSON ({error.msg} at column {error.colno})"
        raise UsageError(msg) from error
    except (ValueError, RecursionError) as error:
        msg = f"not JSON that can be used ({error})"
        raise UsageError(msg) from error
    if not isinstance(row, dict):
        msg = f"the row must be a JSON object, not {text[:40]}"
        raise UsageError(msg)
    if text.count("[") + text.count("{") > DEEPEST and _depth(row) > DEEPEST:
        msg = f"not JSON that can be used (nested more than {DEEPEST} deep)"
        raise UsageError(msg)
    return row


def _depth(value: Any) -> int:
    """Return how many lists and objects are inside of each other."""
    depth, level = 0, [value]
    while level:
        depth += 1
        inside = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [child for children in inside for child in children if isinstance(child, dict | list)]
    return depth


def _no_number(text: str) -> float:
    msg = f"{text} is no JSON number"
    raise ValueError(msg)


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)
