"""Faster text generation on Apple Silicon that says exactly what the model would have said."""

import contextlib
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .blas import load_blas

if TYPE_CHECKING:
    from .decoding.sampling import Sampling
    from .decoding.step import DraftShape
    from .model import SpeculativeModel, load
    from .stream import Response, generate, stream_generate

with contextlib.suppress(ValueError):  # raised again by the first use, where the command line reports it
    load_blas()  # before anything imports mlx.core

__all__ = ["DraftShape", "Response", "Sampling", "SpeculativeModel", "generate", "load", "stream_generate"]


def __getattr__(name: str) -> Any:
    """Import at first use: what takes seconds is not done before the command line can catch Ctrl-C."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    load_blas()
    return getattr(import_module(".model" if name == "load" else ".stream", __name__), name)
