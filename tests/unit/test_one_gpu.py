"""``compose/one-gpu.sh``: as many commands as there are devices, each with one of its own."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = Path(__file__).parents[2] / "compose" / "one-gpu.sh"


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """Play a machine with two devices."""
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf 'GPU-1\\nGPU-2\\n'\n")
    smi.chmod(0o755)
    (tmp_path / "devices").mkdir()
    return {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "ONE_GPU_FOLDER": str(tmp_path / "devices")}


@contextmanager
def worker(machine: dict[str, str]) -> Iterator[str]:
    """Run a command that says what device it has, until its input ends."""
    command = ["/bin/sh", str(SCRIPT), "sh", "-c", 'echo "$CUDA_VISIBLE_DEVICES"; read -r _']
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=machine, text=True, **pipes) as process:  # type: ignore[call-overload]
        said: IO[str] = process.stdout
        yield said.readline().strip()


def test_each_has_a_device_of_its_own_until_it_ends(machine: dict[str, str]) -> None:
    with worker(machine) as first, worker(machine) as second:
        assert [first, second] == ["GPU-1", "GPU-2"]
        third = subprocess.run(
            ["/bin/sh", str(SCRIPT), "true"], env=machine, capture_output=True, text=True, check=False
        )
        assert third.returncode == 1
        assert third.stderr == (
            "one-gpu: each of the devices GPU-1 GPU-2 has a worker: scale gpu-worker to at most as many\n"
        )
    with worker(machine) as again:
        assert again == "GPU-1"
