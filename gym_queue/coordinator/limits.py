"""The limits of a run: the settings of the same names, and what was asked for otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from gym_queue.coordinator.rows import reason
from gym_queue.errors import UsageError, unknown_name
from gym_queue.records import Limits
from gym_queue.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping


def limits_of(settings: Settings, changes: Mapping[str, Any] | None = None) -> Limits:
    """Return the limits that the settings name, with ``changes`` (names and values of ``Limits``).

    Raises:
        UsageError: there is no such limit, or its value cannot be used.
    """
    changes = changes or {}
    for name in changes:
        if name not in Limits.model_fields:
            raise unknown_name(name, Limits.model_fields, kind="limit")
    known = {name: getattr(settings, name) for name in Limits.model_fields if name in Settings.model_fields}
    try:
        return Limits(**known | dict(changes))
    except ValidationError as error:
        msg = f"the limit {reason(error)}"
        raise UsageError(msg) from error
