"""Joules, where the machine can say: Apple Silicon and NVIDIA GPUs, through optional packages."""

import importlib
import os
import platform
from collections.abc import Callable
from typing import Any

from .measure import Meter

WINDOW = "mlx-redrafter"
RAILS = ("cpu_total_mj", "gpu_mj", "gpu_sram_mj", "dram_mj", "ane_mj")  # what a chip does not have is None


class AppleMeter(Meter):
    """CPU, GPU, memory and neural engine together; without root."""

    def __init__(self, module: Any) -> None:
        self.monitor = module.AppleEnergyMonitor()

    def begin(self) -> None:
        self.monitor.begin_window(WINDOW)

    def end(self) -> float | None:
        used = self.monitor.end_window(WINDOW)
        return sum(getattr(used, rail, None) or 0 for rail in RAILS) / 1000


class NvidiaMeter(Meter):
    """The first GPU that this process may use."""

    def __init__(self, module: Any) -> None:
        self.module = module
        module.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
        by_name = visible.startswith(("GPU-", "MIG-"))
        find = module.nvmlDeviceGetHandleByUUID if by_name else module.nvmlDeviceGetHandleByIndex
        self.device = find(visible if by_name else int(visible or 0))
        self.begin()  # a GPU that cannot say is found here

    def begin(self) -> None:
        self.start = self._total()

    def end(self) -> float | None:
        return (self._total() - self.start) / 1000

    def _total(self) -> int:
        return int(self.module.nvmlDeviceGetTotalEnergyConsumption(self.device))  # mJ


def find_meter(backend: str) -> tuple[Meter, str]:
    """A meter for a backend's device, and what it is called or why there is none."""
    kind: Callable[[Any], Meter]
    if backend == "metal" or (platform.system() == "Darwin" and platform.machine() == "arm64"):
        kind, module, package = AppleMeter, "zeus_apple_silicon", "zeus-apple-silicon"
    elif backend == "cuda":
        kind, module, package = NvidiaMeter, "pynvml", "nvidia-ml-py"
    else:
        return Meter(), "not available"
    try:
        return kind(importlib.import_module(module)), package
    except ImportError:
        return Meter(), f"not available (install {package})"
    except Exception as error:  # whatever the driver's binding raises, measuring goes on without it
        return Meter(), f"not available ({type(error).__name__}: {error})"
