"""The short form of each scenario: the real stack, and real faults, for every change."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.chaos import network
from tests.chaos.scenarios import SCENARIOS, Size, run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]
SEED = 1


@pytest.mark.guarantee("G3")
@pytest.mark.parametrize("name", SCENARIOS)
async def test_whatever_dies_nothing_is_lost_stuck_or_counted_twice(name: str, tmp_path: Path) -> None:
    if name == "cut_off" and (missing := network.why_not()):
        assert os.environ.get("CI") != "true", missing
        pytest.skip(missing)
    report = await run(name, tmp_path, SEED, Size.SHORT)
    print(report.noted)  # noqa: T201 - pytest shows it where asked to
