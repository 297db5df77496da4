"""``examples/grpo.py`` as its reader runs it: a head, a worker, a trainer, and a reward that rises."""

from __future__ import annotations

import asyncio
import re
import sys
from typing import TYPE_CHECKING

import pytest

from tests.integration.fleet import IMPATIENT, REPOSITORY, Fleet
from tests.integration.head_process import SETTINGS, HeadProcess

if TYPE_CHECKING:
    from pathlib import Path

TIME_TO_LEARN = 180.0
"""Seconds that learning may take on two cores."""


@pytest.mark.timeout(300)
async def test_the_example_learns(redis_url: str, tmp_path: Path) -> None:
    async with Fleet(redis_url, tmp_path, **IMPATIENT) as fleet:
        await fleet.start("gpu")
        with HeadProcess(tmp_path, fleet.variables) as head:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, str(REPOSITORY / "examples" / "grpo.py")),
                env=fleet.variables | SETTINGS | {"HEAD_SERVER_URL": head.url},
                cwd=tmp_path,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            try:
                async with asyncio.timeout(TIME_TO_LEARN):
                    output, errors = await process.communicate()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            said = output.decode()
            print(said)  # noqa: T201 - shown by `pytest -rP`, and where the test fails
            assert process.returncode == 0, errors.decode()
            training = max(head.get("/v1/runs")["runs"], key=lambda run: run["examples"])

    rewards = re.findall(r"^reward (?:before|after): (\S+)$", said, re.MULTILINE)
    before, after = map(float, rewards)
    assert after > before + 0.1  # about four standard errors
    behind = [int(found) for found in re.findall(r"^step .* (-?\d+) behind$", said, re.MULTILINE)]
    assert set(behind) <= {0, 1}
    assert training["groups"]["complete"] == 32 * len(behind) == 512
