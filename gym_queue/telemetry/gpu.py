"""What NVIDIA's management library says of this machine's GPUs, where there are any (extra ``gpu``)."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gym_queue.telemetry import catalogue as the

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gym_queue.telemetry.catalogue import Family

_log = logging.getLogger(__name__)


class Gpus:
    """The GPUs of this machine, of none where the library or its driver is missing."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        try:
            nvml = import_module("pynvml")
            nvml.nvmlInit()
            self._handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            self._nvml = nvml
        except ImportError:
            _log.debug("no GPU is measured: nvidia-ml-py is not installed (the extra 'gpu')")
        except Exception as error:  # noqa: BLE001 - NVMLError, of a library that may not be there
            _log.debug("no GPU is measured: %s", error)

    def families(self) -> Iterator[Family]:
        """Yield utilisation and memory of each; one that does not answer is left out."""
        use, used, total = the.GPU_USE.family(), the.GPU_MEMORY_USED.family(), the.GPU_MEMORY_TOTAL.family()
        for index, handle in enumerate(self._handles):
            try:
                name, uuid = self._nvml.nvmlDeviceGetName(handle), self._nvml.nvmlDeviceGetUUID(handle)
                rates = self._nvml.nvmlDeviceGetUtilizationRates(handle)
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            except self._nvml.NVMLError as error:
                _log.debug("GPU %d does not answer: %s", index, error)
                continue
            labels = str(index), _text(name), _text(uuid)
            use.add(rates.gpu / 100, *labels)
            used.add(memory.used, *labels)
            total.add(memory.total, *labels)
        yield from (use, used, total)


def _text(said: str | bytes) -> str:
    """Read a text of a library that gave bytes before its release 11.5."""
    return said.decode() if isinstance(said, bytes) else said
