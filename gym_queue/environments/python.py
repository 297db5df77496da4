"""A user's own environment: ``python:module:Class[?key=value&…]``.

The module is imported as ``python -m`` would: the working directory is on the path. Options become keyword
arguments of the class; a value that is JSON arrives as such (``limit=10`` a number, ``strict=true`` a truth
value), any other as text.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gym_queue.environments.base import Environment, parse_name
from gym_queue.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from types import ModuleType


def create(name: str) -> Environment:
    """Import the module and make an object of the class.

    Raises:
        UsageError: no such module or class, not a subclass of ``Environment``, or either of them raised.
    """
    _, target, texts = parse_name(name)
    module_name, _, class_name = target.partition(":")
    if not module_name or not class_name:
        msg = f"environment {name}: expected python:module:Class"
        raise UsageError(msg)
    kind = _find_class(name, _import(name, module_name), class_name)
    options = {key: _value(text) for key, text in texts.items()}
    try:
        return kind(**options)
    except Exception as error:
        msg = f"environment {name}: {class_name}({_shown(options)}) raised {type(error).__name__}: {error}"
        raise UsageError(msg) from error


def _import(name: str, module_name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(missing + "."):
            msg = f"environment {name}: there is no module {missing!r} on the path or in {here}"
            raise UsageError(msg) from error
        msg = f"environment {name}: module {module_name!r} needs {missing!r}, which is not installed"
        raise UsageError(msg) from error
    except Exception as error:
        msg = f"environment {name}: importing {module_name!r} raised {type(error).__name__}: {error}"
        raise UsageError(msg) from error


def _find_class(name: str, module: ModuleType, class_name: str) -> type[Environment]:
    found = getattr(module, class_name, None)
    if found is None:
        ours = [key for key, value in vars(module).items() if _is_environment(value)]
        raise unknown_name(class_name, ours, kind=f"environment class in module {module.__name__}")
    if not _is_environment(found):
        msg = f"environment {name}: {class_name} is not a subclass of gym_queue.environments.base.Environment"
        raise UsageError(msg)
    environment: type[Environment] = found
    return environment


def _is_environment(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Environment) and value is not Environment


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _shown(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())
