"""What a person sees while a run goes on: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Never, Protocol, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

    from gym_queue.coordinator.run import Progress

LINE_INTERVAL = 5.0
"""Seconds between two plain lines."""


class View(Protocol):
    """Shows a run's progress."""

    def update(self, progress: Progress) -> None:
        """Take note of where the run stands now. Cheap: drawing is throttled."""

    def refresh(self) -> None:
        """Draw if it is time to; call it now and then, since a stuck run sends no updates."""

    def note(self, sentence: str) -> None:
        """Write a line of its own."""

    def close(self) -> None:
        """Draw the last state. Nothing may be drawn afterwards."""


def open_view(stream: TextIO, total: int, before: int, clock: Callable[[], float] = time.monotonic) -> View:
    """Return the view that fits ``stream``: a bar if it is a terminal.

    Args:
        stream: where to draw.
        total: rollouts of the run.
        before: rollouts that an earlier command had done; they count as done, not as speed.
        clock: seconds, monotonic.
    """
    return Bar(stream, total, before) if stream.isatty() else Lines(stream, total, before, clock)


def _facts(progress: Progress) -> list[str]:
    facts = [f"{progress.failed} failed", f"{progress.in_flight} in flight"]
    if progress.paused:
        facts.insert(0, "paused")
    if progress.cancelled:
        facts.insert(-1, f"{progress.cancelled} cancelled")
    if progress.reward_mean is not None:
        facts.append(f"mean reward {progress.reward_mean:.3f}")
    return facts


def _done(progress: Progress) -> int:
    return progress.succeeded + progress.failed + progress.cancelled


class Bar:
    """A tqdm bar; log lines appear above it."""

    def __init__(self, stream: TextIO, total: int, before: int) -> None:
        from tqdm import tqdm  # noqa: PLC0415 - slow to import, and not needed where there is no terminal
        from tqdm.contrib.logging import logging_redirect_tqdm  # noqa: PLC0415

        self._logs = logging_redirect_tqdm([logging.getLogger("gym_queue")])
        self._logs.__enter__()
        tqdm.monitor_interval = 0  # no thread of its own: ``refresh`` does its work
        self._bar: tqdm[Never] = tqdm(
            file=stream,
            total=total,
            initial=before,
            unit=" rollouts",
            dynamic_ncols=True,
            smoothing=0.1,
            bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, "
            "{rate_fmt}{postfix}]",
        )

    def update(self, progress: Progress) -> None:
        """See ``View``."""
        self._bar.set_postfix_str(", ".join(_facts(progress)), refresh=False)
        self._bar.update(_done(progress) - self._bar.n)

    def refresh(self) -> None:
        """See ``View``."""
        self._bar.refresh()

    def note(self, sentence: str) -> None:
        """See ``View``."""
        self._bar.write(sentence, file=self._bar.fp)

    def close(self) -> None:
        """See ``View``."""
        self._bar.refresh()
        self._bar.close()
        self._logs.__exit__(None, None, None)


class Lines:
    """One line every ``LINE_INTERVAL`` seconds, and one at the end."""

    def __init__(self, stream: TextIO, total: int, before: int, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._total = total
        self._before = before
        self._clock = clock
        self._start = self._last = clock()
        self._progress: Progress | None = None

    def update(self, progress: Progress) -> None:
        """See ``View``."""
        self._progress = progress
        self.refresh()

    def refresh(self) -> None:
        """See ``View``."""
        if self._clock() - self._last >= LINE_INTERVAL:
            self._draw()

    def note(self, sentence: str) -> None:
        """See ``View``."""
        self._print(sentence)

    def close(self) -> None:
        """See ``View``."""
        self._draw()

    def _draw(self) -> None:
        self._last = self._clock()
        if self._progress is None:
            return
        done = _done(self._progress)
        elapsed = self._last - self._start
        rate = (done - self._before) / elapsed if elapsed > 0 else 0.0
        left = self._total - done
        facts = [f"{done}/{self._total} rollouts", *_facts(self._progress), f"{rate:.1f} rollouts/s"]
        if left and rate > 0:
            facts.append(f"{_duration(left / rate)} left")
        self._print(f"[{_duration(elapsed)}] {', '.join(facts)}")

    def _print(self, line: str) -> None:
        with suppress(OSError):  # it may go to a disk that is full: the run is worth more than a line of it
            print(line, file=self._stream, flush=True)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
