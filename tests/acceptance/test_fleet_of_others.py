"""``submit-rollouts --workers 0 --verifiers 0``: a real command that only coordinates, and a fleet."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING

from gym_queue.testing import async_wait_until
from tests.acceptance.commands import children
from tests.integration.fleet import WORLD, Fleet

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

EXAMPLES = 30
COMMAND = [
    sys.executable, "-m", "gym_queue.cli.submit", "in.jsonl", "--model", "stub:", "--environment", WORLD,
    "-o", "out.jsonl", "--workers", "0", "--verifiers", "0",
]  # fmt: skip


async def test_a_command_without_workers_uses_those_that_are_there(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HEAD_SERVER_URL", raising=False)
    rows = [{"wait": True, "queued": number % 2} for number in range(EXAMPLES)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    async with Fleet(redis_url, tmp_path) as fleet:
        await fleet.start("gpu1", "cpu1", "beat")
        command = await asyncio.create_subprocess_exec(
            *COMMAND,
            env=fleet.variables,
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:

            async def all_at_work() -> bool:
                assert command.returncode is None
                return await fleet.owned("gpu1") == EXAMPLES

            await async_wait_until(all_at_work, 60, what="the fleet to have all rollouts")
            assert children(command.pid) == {}, "it starts no process"
            fleet.gate.touch()
            said, errors = await asyncio.wait_for(command.communicate(), 60)
        finally:
            if command.returncode is None:
                command.kill()
                await command.wait()
        assert command.returncode == 0, errors.decode()
        assert f"{EXAMPLES} succeeded, 0 failed" in said.decode()
        ids = [
            json.loads(line)["example_index"] for line in (tmp_path / "out.jsonl").read_text().splitlines()
        ]
        assert ids == list(range(EXAMPLES))
        assert all(process.poll() is None for process in fleet.processes.values()), "the fleet is left alone"
