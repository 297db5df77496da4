"""Logs of every process: lines on stderr, which whoever started the process collects.

A line says whose life it belongs to (``telemetry.story``), as plain text or as one JSON object.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from gym_queue.telemetry import story
from gym_queue.telemetry.secrets import Censor, secrets_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gym_queue.settings import Settings

_FORMAT = "%(asctime)s %(levelname)s {role}[%(process)d] %(name)s: %(message)s"
_OTHERS = ("celery", "kombu", "uvicorn")


class _TextFormatter(logging.Formatter):
    """Plain lines; whose they are stands at their end, in brackets."""

    def __init__(self, role: str, censor: Censor) -> None:
        super().__init__(_FORMAT.format(role=role))
        self._censor = censor

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return super().formatMessage(record) + _bracketed(story.names())

    def format(self, record: logging.LogRecord) -> str:
        return self._censor(super().format(record))


def _bracketed(names: dict[str, Any]) -> str:
    if not names:
        return ""
    words = [str(names.get("rollout_id", names["run_id"]))]
    if "attempt" in names:
        words.append(f"{names['stage']} attempt {names['attempt']}")
    return f" [{' '.join(words)}]"


class _JsonFormatter(logging.Formatter):
    """One JSON object a line; ``docs/reference/logs.md`` lists its keys."""

    def __init__(self, role: str, censor: Censor) -> None:
        super().__init__()
        self._role = role
        self._censor = censor

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "role": self._role,
            "pid": record.process,
            "logger": record.name,
            "message": self._censor(record.getMessage()),
            **story.names(),
        }
        error = [self.formatException(record.exc_info)] if record.exc_info else []
        if record.stack_info:
            error.append(record.stack_info)
        if error:
            line["error"] = self._censor("\n".join(error))
        return json.dumps(line, ensure_ascii=False)


def configure(
    level: str,
    role: str = "gym_queue",
    *,
    form: str = "text",
    secrets: Iterable[str] = (),
    all_loggers: bool = False,
) -> None:
    """Log ``gym_queue`` from ``level`` on, and warnings of Celery and kombu, to stderr. May be repeated.

    Args:
        level: a name such as ``INFO``; case does not matter.
        role: what this process is (``gpu``, ``cpu``, ``beat``, ``head``); it stands in each line.
        form: ``text`` or ``json``.
        secrets: what is starred out wherever it occurs.
        all_loggers: take the root logger too, from warnings on: for processes that are ours alone. Without
            it the root logger is left alone: it belongs to whoever embeds us.
    """
    made = _JsonFormatter if form == "json" else _TextFormatter
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(made(role, Censor(secrets)))
    own = logging.getLogger("gym_queue")
    own.setLevel(level.upper())
    for logger in (own, *map(logging.getLogger, _OTHERS)):
        logger.handlers = [handler]
        logger.propagate = False
    others = [logging.getLogger(name) for name in _OTHERS]
    if all_loggers:
        others.append(logging.getLogger())
        others[-1].handlers = [handler]
    for logger in others:
        logger.setLevel(max(own.level, logging.WARNING))


def configure_process(settings: Settings, role: str) -> None:
    """Configure all logs of a process of ours as the settings say, without their secrets."""
    configure(
        settings.log_level,
        role,
        form=settings.log_format,
        secrets=secrets_of(settings),
        all_loggers=True,
    )
