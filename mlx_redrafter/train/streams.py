"""Parts of one computation that run side by side.

MLX's CPU operations other than matrix products use one thread per stream, so one stream per core, each
with a single-threaded BLAS, is fastest there (measured on two cores: 1.6 times one stream with a
two-threaded BLAS). A GPU is busy with one.
"""

import functools
import os

import mlx.core as mx


def default_streams() -> int:
    """One per core on a CPU, one on a GPU."""
    return 1 if mx.default_device().type == mx.gpu else max(1, min(os.cpu_count() or 1, 8))


@functools.cache
def stream(index: int) -> mx.Stream:
    """The device's stream number ``index``; MLX never ends a stream's thread, so each is made once."""
    device = mx.default_device()
    return mx.default_stream(device) if index == 0 else mx.new_stream(device)
