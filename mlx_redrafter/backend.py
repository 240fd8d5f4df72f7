"""What differs between Metal, CUDA and CPU: a table of facts. The decoding core imports none of it."""

import platform
from dataclasses import dataclass

import mlx.core as mx

from .decoding.step import DraftShape


@dataclass(frozen=True)
class Backend:
    """Defaults for one kind of device.

    Attributes:
        name: metal, cuda or cpu.
        dtype: the type that weights are given at load, dequantized if need be; None keeps them.
        shape: how much is drafted. Metal: verifying up to 4 rows costs little on every Apple GPU,
            more costs 2x and up on 4-bit models. CUDA: 32 rows cost about what one does. CPU: 8 rows
            cost less than 6 in OpenBLAS. Only the CPU's was measured by this project.
    """

    name: str
    dtype: str | None
    shape: DraftShape


METAL = Backend("metal", None, DraftShape(1, 3))
CUDA = Backend("cuda", None, DraftShape(4, 5))
# Half-precision and quantized products do not use the BLAS on a CPU and cost a multiple of float32.
CPU = Backend("cpu", "float32", DraftShape(3, 3, 8))


def current() -> Backend:
    """The backend of MLX's default device."""
    if mx.default_device().type != mx.gpu:
        return CPU
    return METAL if mx.metal.is_available() else CUDA


def chip() -> str:
    """What the device calls itself, for reports."""
    return str(mx.device_info().get("device_name") or platform.processor() or platform.machine())
