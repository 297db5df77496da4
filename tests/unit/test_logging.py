"""Our log lines go to stderr once, and nobody else's loggers change."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from gym_queue.telemetry.logging import configure

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = ("gym_queue", "celery", "kombu")


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    before = {
        name: (log.handlers, log.level, log.propagate) for name in NAMES if (log := logging.getLogger(name))
    }
    yield
    for name, (handlers, level, propagate) in before.items():
        log = logging.getLogger(name)
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


def test_lines_go_to_stderr_with_level_and_role(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", "gpu")
    logging.getLogger("gym_queue.somewhere").info("hello %s", "there")
    logging.getLogger("gym_queue.somewhere").debug("quiet")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert " INFO gpu[" in shown.err
    assert shown.err.endswith("gym_queue.somewhere: hello there\n")
    assert "quiet" not in shown.err


def test_configuring_again_does_not_double_lines(capsys: pytest.CaptureFixture[str]) -> None:
    configure("INFO")
    configure("DEBUG")
    logging.getLogger("gym_queue").debug("once")
    assert capsys.readouterr().err.count("once") == 1


def test_celery_is_heard_when_it_warns(capsys: pytest.CaptureFixture[str]) -> None:
    configure("DEBUG")
    logging.getLogger("celery.worker").info("chatter")
    logging.getLogger("celery.worker").warning("connection lost")
    shown = capsys.readouterr().err
    assert "connection lost" in shown
    assert "chatter" not in shown


def test_the_root_logger_is_left_alone() -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    configure("DEBUG")
    assert (list(root.handlers), root.level) == before
