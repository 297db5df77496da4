"""Ctrl-C and SIGTERM: first gently, then at once."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While entered, a signal calls ``gently`` if that is set; otherwise, and next time, it cancels the task.

    Signals after that change nothing: what cleans up is left to do so.
    """

    def __init__(self) -> None:
        self.gently: Callable[[], None] | None = None
        self._task: asyncio.Task[object] | None = None

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in _SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self.gently is not None:
            gently, self.gently = self.gently, None
            gently()
        elif self._task is not None:
            task, self._task = self._task, None
            task.cancel()
