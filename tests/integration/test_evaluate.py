"""``examples/evaluate.py``, the script that the documentation shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from tests.unit.client.fake_head import TOKEN, FakeHead, playing_beside

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parents[2]


def test_a_run_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def metrics(*_: Any) -> web.Response:
        return web.json_response({"reward": {"mean": 0.5}, "pass_at_k": {"1": 0.5, "4": 1.0}})

    monkeypatch.setattr(FakeHead, "_metrics", metrics)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": str(n)}) + "\n" for n in range(2)))
    with playing_beside() as head:
        done = subprocess.run(
            [sys.executable, ROOT / "examples" / "evaluate.py", tmp_path / "in.jsonl", "stub:"],
            env={**os.environ, "HEAD_SERVER_URL": head.url, "GYM_QUEUE_AUTH_TOKEN": TOKEN},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    lines = [f"run-0.{example}.{sample} {sample % 2:.1f}" for example in range(2) for sample in range(4)]
    assert done.stdout.splitlines() == [*lines, "mean reward 0.500", "pass@1 0.500, pass@4 1.000"]
