"""What differs between Metal, CUDA and CPU: a table of facts. The decoding core imports none of it."""

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..decoding.state import PLAIN, DraftShape


@dataclass(frozen=True)
class Backend:
    """Defaults for one kind of device.

    Attributes:
        name: metal, cuda or cpu.
        dtype: the type that weights are given at load, dequantized if need be; None keeps them.
        shapes: what the automatic choice chooses from, plain decoding first. Which of them pays is
            measured on the machine; these are what its kernels are made for.
        in_floats: the same for models whose weights are not quantized, where that matters.
        grain: rows by which attention's view of the buffers grows, while it is short. 1: always row
            by row, since nothing is compiled, and a plain step that sees only its own rows needs no mask.
        compiled: whether steps are compiled.
        eager: whether the next step is handed over before the last one's tokens are returned. On a CPU the
            hand-over waits until most of the step is done, and the tokens would wait with it.
        passage: prompt tokens in one forward pass; few on CPUs, where attention computes what its mask hides.
    """

    name: str
    dtype: str | None
    shapes: tuple[DraftShape, ...]
    grain: int
    compiled: bool
    eager: bool
    in_floats: tuple[DraftShape, ...] = ()
    passage: int = 1 << 62

    def shapes_for(self, weights: Iterable[mx.array]) -> tuple[DraftShape, ...]:
        """What the automatic choice chooses from, for a model with these weights."""
        is_quantized = any(weight.dtype == mx.uint32 for weight in weights)  # packed
        return self.shapes if is_quantized or not self.in_floats else self.in_floats

    def padded(self, texts: int) -> int:
        """How many texts a step is made for: compiled, the next power of two, so that few are traced."""
        return 1 << (texts - 1).bit_length() if self.compiled else texts


def _shapes(*shapes: tuple[int, int, int | None, int]) -> tuple[DraftShape, ...]:
    """Plain decoding, then shapes of these widths, lengths, sizes and lookups."""
    return (PLAIN, *(DraftShape(*shape) for shape in shapes))


_SMALL = ((0, 0, None, 3), (1, 1, 2, 1), (1, 2, 3, 2), (2, 3, 5, 4), (3, 4, 8, 4))
# Up to 5 rows cost little with 4-bit weights on every Apple GPU, more than that fill one tile of 32 rows;
# attention has its vector kernel up to 8 rows (if rows x heads per key head <= 32). In half precision 15 rows
# are cheap and 16 cost twice as much on an M2 Ultra (Apple's own measurements; MLX's wide gemv ends at 15).
METAL = Backend(
    "metal",
    None,
    _shapes(*_SMALL, (4, 5, 16, 5), (8, 5, 32, 6)),
    grain=256,
    compiled=True,
    eager=True,
    in_floats=_shapes(*_SMALL, (4, 5, 15, 5)),
)
# Tensor cores take over at 8 rows; up to 64 rows cost about what one does in half precision.
CUDA = Backend(
    "cuda",
    None,
    _shapes((0, 0, None, 7), (2, 4, 8, 4), (4, 5, 16, 5), (8, 5, 32, 6), (16, 5, 64, 8)),
    grain=256,
    compiled=True,
    eager=True,
)
# Half-precision and quantized products do not use the BLAS on a CPU and cost a multiple of float32. In
# OpenBLAS, 8 rows cost less than 6 and 16 no more than 12. Compiling would call a C++ compiler.
CPU = Backend(
    "cpu",
    "float32",
    _shapes((0, 0, None, 3), (0, 0, None, 7), (1, 1, 2, 1), (2, 2, 4, 3), (3, 3, 8, 4), (4, 4, 16, 5)),
    grain=1,
    compiled=False,
    eager=False,
    passage=256,
)


def current() -> Backend:
    """The backend of MLX's default device."""
    if mx.default_device().type != mx.gpu:
        return CPU
    return METAL if mx.metal.is_available() else CUDA


def free_memory() -> int:
    """Bytes that texts may take: nine tenths of the most that the device should use, less what is in use."""
    known: dict[str, Any] = mx.device_info()
    size = known.get("max_recommended_working_set_size") or known.get("memory_size") or 0
    size = size or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(int(0.9 * size) - mx.get_active_memory(), 0)


def chip() -> str:
    """What the device calls itself, for reports."""
    return str(mx.device_info().get("device_name") or platform.processor() or platform.machine())
