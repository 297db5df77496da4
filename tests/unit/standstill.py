"""A process that stands still, for its event loop: the clock runs on, and nothing else does."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def stand_still(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the running event loop find that it did not run for so long."""
    loop = asyncio.get_running_loop()
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + seconds)
