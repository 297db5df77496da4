"""The head does what its OpenAPI document says, and nothing that schemathesis thinks of makes it fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.head_process import TOKEN, HeadProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parent
CHECKS = "not_a_server_error,response_schema_conformance,status_code_conformance,content_type_conformance"
SERVER = {"name": "policy", "kind": "responses_api_models", "url": "http://node-7:8000"}


@pytest.fixture
def head(redis_url: str, tmp_path: Path) -> Iterator[HeadProcess]:
    variables = os.environ | {"GYM_QUEUE_REDIS_URL": redis_url, "NUM_EXPECTED_WORKERS": "0"}
    with HeadProcess(tmp_path, variables) as process:
        yield process


def ended_run(head: HeadProcess) -> str:
    """Make a run that has ended, so that feeds of it end too."""
    run_id: str = head.post("/v1/runs", {"model": "stub:", "samples": 2})["run_id"]
    head.post(f"/v1/runs/{run_id}/examples", b'{"prompt": "a"}\n{"prompt": "b"}\n')
    head.post(f"/v1/runs/{run_id}/cancel")
    assert list(head.follow(f"/v1/runs/{run_id}/groups"))[-1]["end"] == {"state": "cancelled"}
    return run_id


@pytest.mark.timeout(300)
def test_the_head_is_what_its_document_says(head: HeadProcess, tmp_path: Path) -> None:
    run_id, server = ended_run(head), head.post("/v1/servers", SERVER)["id"]
    known = {"run_id": run_id, "rollout_id": f"{run_id}.0.0", "server_id": server}
    config = tmp_path / "schemathesis.toml"
    parameters = "".join(f'"path.{name}" = "{value}"\n' for name, value in known.items())
    config.write_text(f"[phases.coverage]\nunexpected-methods = []\n[parameters]\n{parameters}")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"),
            *(f"{head.url}/openapi.json", "--header", f"Authorization: Bearer {TOKEN}", "--warnings", "off"),
            *("--phases", "coverage,fuzzing", "--max-examples", "8", "--generation-deterministic"),
            *("--checks", CHECKS, "--continue-on-failure", "--request-timeout", "30"),
        ],
        cwd=tmp_path,
        env=os.environ | {"SCHEMATHESIS_HOOKS": str(FOLDER / "schemathesis_hooks.py")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Coverage" in done.stdout
    assert "Tested: 26" in done.stdout
    assert "Traceback" not in head.log.read_text()
    assert head.client.get("/ready").status_code == 200
