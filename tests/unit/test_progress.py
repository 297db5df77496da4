"""What a person sees while a run goes on."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import pty
import re
import struct
import sys
import termios
from contextlib import suppress
from typing import TYPE_CHECKING

from gym_queue.cli.progress import LINE_INTERVAL, Bar, Lines, open_view
from gym_queue.coordinator.run import Progress

if TYPE_CHECKING:
    import pytest


class Clock:
    """Time as the test tells it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def progress(succeeded: int, failed: int = 0, *, cancelled: int = 0, reward: float | None = 0.25) -> Progress:
    return Progress(
        total=100, succeeded=succeeded, failed=failed, cancelled=cancelled, in_flight=7, reward_mean=reward
    )


def test_lines_say_everything() -> None:
    stream, clock = io.StringIO(), Clock()
    view = open_view(stream, 100, 0, clock)
    assert isinstance(view, Lines)
    clock.now += 10.0
    view.update(progress(38, 2))
    assert stream.getvalue() == (
        "[0:00:10] 40/100 rollouts, 2 failed, 7 in flight, mean reward 0.250, 4.0 rollouts/s, 0:00:15 left\n"
    )


def test_lines_are_few() -> None:
    stream, clock = io.StringIO(), Clock()
    view = open_view(stream, 100, 0, clock)
    for done in range(100):
        clock.now += LINE_INTERVAL / 10
        view.update(progress(done))
    assert stream.getvalue().count("\n") == 10
    view.close()
    assert stream.getvalue().count("\n") == 11
    assert "99/100" in stream.getvalue().splitlines()[-1]


def test_a_stuck_run_goes_on_showing_that_it_is_stuck() -> None:
    stream, clock = io.StringIO(), Clock()
    view = open_view(stream, 100, 0, clock)
    view.update(progress(0, reward=None))
    for _ in range(3):
        clock.now += LINE_INTERVAL
        view.refresh()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[-1] == "[0:00:15] 0/100 rollouts, 0 failed, 7 in flight, 0.0 rollouts/s"


def test_a_paused_run_says_so() -> None:
    stream, clock = io.StringIO(), Clock()
    view = open_view(stream, 100, 0, clock)
    clock.now += 10.0
    view.update(progress(40, cancelled=1).model_copy(update={"paused": True}))
    assert "41/100 rollouts, paused, 0 failed, 1 cancelled, 7 in flight" in stream.getvalue()


def test_what_an_earlier_command_did_is_no_speed() -> None:
    stream, clock = io.StringIO(), Clock()
    view = open_view(stream, 100, 60, clock)
    clock.now += 10.0
    view.update(progress(80, cancelled=1))
    [line] = stream.getvalue().splitlines()
    assert "81/100 rollouts, 0 failed, 1 cancelled," in line
    assert "2.1 rollouts/s, 0:00:09 left" in line


def test_nothing_known_is_nothing_said() -> None:
    stream = io.StringIO()
    open_view(stream, 100, 0, Clock()).close()
    assert stream.getvalue() == ""


def test_a_log_on_a_full_disk_stops_no_run() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device that has no room
        view = open_view(full, 100, 0, Clock())
        view.note("interrupted")
        view.update(progress(10))
        view.close()
        with suppress(OSError):
            full.close()


def everything_from(terminal: int) -> str:
    """Return what was drawn on a terminal whose other end is closed, and close it."""
    chunks: list[bytes] = []
    with suppress(OSError):  # EIO is how Linux says that there is no more
        while chunk := os.read(terminal, 65536):
            chunks.append(chunk)
    os.close(terminal)
    return b"".join(chunks).decode()


def test_a_terminal_gets_a_bar() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 150, 0, 0))
    with os.fdopen(theirs, "w") as terminal:
        view = open_view(terminal, 100, 20)
        assert isinstance(view, Bar)
        view.note("one line")
        view.update(progress(57, 3))
        view.refresh()
        view.close()
    shown = everything_from(ours)
    last = shown.replace("\r\n", "").split("\r")[-1]
    assert "one line\r\n" in shown
    assert re.search(r"60% \|.*\| 60/100 \[.* left, .*3 failed, 7 in flight, mean reward 0\.250\]", last), (
        shown
    )


def test_log_lines_appear_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, log = io.StringIO(), logging.getLogger("gym_queue")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(log, "handlers", [logging.StreamHandler(sys.stderr)])
    before = log.handlers
    bar = Bar(stream, 100, 0)
    log.warning("gpu1 was killed")
    bar.close()
    assert "\rgpu1 was killed\n" in stream.getvalue()
    assert log.handlers == before


def test_notes_between_lines() -> None:
    stream = io.StringIO()
    open_view(stream, 100, 0, Clock()).note("interrupted")
    assert stream.getvalue() == "interrupted\n"


def test_a_bar_counts_an_update_once() -> None:
    stream = io.StringIO()
    bar = Bar(stream, 100, 0)
    for done in (10, 10, 30):
        bar.update(progress(done))
    bar.close()
    assert "30/100" in stream.getvalue().split("\r")[-1]
