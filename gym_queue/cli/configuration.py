"""The settings of a command: flags over environment over file."""

from __future__ import annotations

import logging
import tomllib
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from gym_queue.errors import UsageError

if TYPE_CHECKING:
    from gym_queue.settings import Settings


def load_settings(**flags: Any) -> Settings:
    """Return the settings; a flag that is ``None`` was not given.

    Raises:
        UsageError: a value cannot be used.
    """
    from gym_queue.settings import Settings  # noqa: PLC0415 - not needed for --help

    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        msg = f"the setting {name} cannot be used: {first['msg']}"
        raise UsageError(msg) from error
    except tomllib.TOMLDecodeError as error:
        msg = f"gym_queue.toml is not TOML: {error}"
        raise UsageError(msg) from error
    if settings.log_level.upper() not in logging.getLevelNamesMapping():
        msg = f"the setting LOG_LEVEL cannot be used: {settings.log_level} is no level"
        raise UsageError(msg)
    return settings
