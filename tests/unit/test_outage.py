"""What a process says of something that is away: once that it is, once that it is back."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gym_queue.telemetry.outage import Outage

if TYPE_CHECKING:
    import pytest


def test_an_outage_is_said_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage(logging.getLogger("test"), "the broker")
    outage.is_over()
    for _ in range(3):
        outage.goes_on(OSError("refused"))
    for _ in range(3):
        outage.is_over()
    outage.goes_on(OSError("again"))
    said = [record.getMessage() for record in caplog.records]
    assert ["refused" in said[0], "can be used again" in said[1], "again" in said[2]] == [True] * 3
    assert len(said) == 3
