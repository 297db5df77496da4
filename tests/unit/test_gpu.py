"""GPUs are measured where there are some; a machine without, or one that breaks, is no error."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from gym_queue.telemetry.gpu import Gpus
from tests.unit.prometheus import shown


class NVMLError(Exception):
    pass


class Nvml:
    """Two GPUs; the second does not answer while it is ``broken``."""

    NVMLError = NVMLError

    def __init__(self) -> None:
        self.broken = False
        self.no_driver = False

    def nvmlInit(self) -> None:  # noqa: N802 - the library's names
        if self.no_driver:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:  # noqa: N802
        if handle and self.broken:
            raise NVMLError("GPU is lost")
        return b"H100" if handle else "H200"

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=75 + handle, memory=1)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(used=1000 + handle, total=8000, free=7000)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def gpu_numbers(gpus: Gpus) -> dict[str, float]:
    return {name: value for name, value in shown(gpus.families()).items() if "_gpu_" in name}


@pytest.mark.usefixtures("nvml")
def test_each_gpu_shows_use_and_memory() -> None:
    first, second = "{gpu=0,name=H200,uuid=GPU-0}", "{gpu=1,name=H100,uuid=GPU-1}"
    assert gpu_numbers(Gpus()) == {
        f"gym_queue_gpu_utilization_ratio{first}": 0.75,
        f"gym_queue_gpu_utilization_ratio{second}": 0.76,
        f"gym_queue_gpu_memory_used_bytes{first}": 1000,
        f"gym_queue_gpu_memory_used_bytes{second}": 1001,
        f"gym_queue_gpu_memory_total_bytes{first}": 8000,
        f"gym_queue_gpu_memory_total_bytes{second}": 8000,
    }


def test_one_that_is_lost_leaves_the_others(nvml: Nvml) -> None:
    gpus = Gpus()
    nvml.broken = True
    assert len(gpu_numbers(gpus)) == 3


def test_without_a_driver_there_are_none(nvml: Nvml) -> None:
    nvml.no_driver = True
    assert gpu_numbers(Gpus()) == {}


def test_without_the_library_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_numbers(Gpus()) == {}
