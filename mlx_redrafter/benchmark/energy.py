"""Joules, where the machine can say: Apple Silicon and NVIDIA GPUs, through optional packages."""

import importlib
import os
import platform
from typing import Any

from .measure import Meter

WINDOW = "mlx-redrafter"
RAILS = ("cpu_total_mj", "gpu_mj", "gpu_sram_mj", "dram_mj", "ane_mj")  # what a chip does not have is None


class NoMeter:
    """A machine that cannot say."""

    def begin(self) -> None:
        pass

    def end(self) -> float | None:
        return None


class AppleMeter:
    """CPU, GPU, memory and neural engine together; without root."""

    def __init__(self, module: Any) -> None:
        self.monitor = module.AppleEnergyMonitor()

    def begin(self) -> None:
        self.monitor.begin_window(WINDOW)

    def end(self) -> float | None:
        used = self.monitor.end_window(WINDOW)
        return sum(getattr(used, rail, None) or 0 for rail in RAILS) / 1000


class NvidiaMeter:
    """The first GPU that this process may use."""

    def __init__(self, module: Any) -> None:
        self.module = module
        module.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
        by_name = visible.startswith(("GPU-", "MIG-"))
        find = module.nvmlDeviceGetHandleByUUID if by_name else module.nvmlDeviceGetHandleByIndex
        self.device = find(visible if by_name else int(visible or 0))
        self.start = self._total()

    def begin(self) -> None:
        self.start = self._total()

    def end(self) -> float | None:
        return (self._total() - self.start) / 1000

    def _total(self) -> int:
        return int(self.module.nvmlDeviceGetTotalEnergyConsumption(self.device))  # mJ


def find_meter(backend: str) -> tuple[Meter, str]:
    """A meter for a backend's device, and what it is called or why there is none."""
    if backend == "metal" or (platform.system() == "Darwin" and platform.machine() == "arm64"):
        return _meter(AppleMeter, "zeus_apple_silicon", "zeus-apple-silicon")
    if backend == "cuda":
        return _meter(NvidiaMeter, "pynvml", "nvidia-ml-py")
    return NoMeter(), "not available"


def _meter(kind: Any, module: str, package: str) -> tuple[Meter, str]:
    try:
        return kind(importlib.import_module(module)), package
    except ImportError:
        return NoMeter(), f"not available (install {package})"
    except Exception as error:  # whatever the driver's binding raises, measuring goes on without it
        return NoMeter(), f"not available ({type(error).__name__}: {error})"
