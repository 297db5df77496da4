"""Logs of every process: plain lines on stderr, which whoever started the process collects."""

from __future__ import annotations

import logging
import sys

_FORMAT = "%(asctime)s %(levelname)s {role}[%(process)d] %(name)s: %(message)s"
_OTHERS = ("celery", "kombu", "uvicorn")


def configure(level: str, role: str = "gym_queue") -> None:
    """Log ``gym_queue`` from ``level`` on, and warnings of Celery, kombu and uvicorn, to stderr. May be
    repeated.

    The root logger is left alone: it belongs to whoever embeds us.

    Args:
        level: a name such as ``INFO``; case does not matter.
        role: what this process is (``gpu``, ``cpu``, ``beat``); it stands in each line.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT.format(role=role)))
    own = logging.getLogger("gym_queue")
    own.setLevel(level.upper())
    for logger in (own, *map(logging.getLogger, _OTHERS)):
        logger.handlers = [handler]
        logger.propagate = False
    for name in _OTHERS:
        logging.getLogger(name).setLevel(max(own.level, logging.WARNING))
