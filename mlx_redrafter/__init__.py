"""Faster text generation on Apple Silicon that says exactly what the model would have said."""

import contextlib
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .blas import load_blas

if TYPE_CHECKING:
    from .batch_generator import BatchGenerator
    from .decoding.sampling import Sampling
    from .decoding.state import DraftShape
    from .engine.engine import Engine, Request
    from .model import SpeculativeModel, load
    from .session import Session
    from .text import Response, generate, stream_generate

with contextlib.suppress(ValueError):  # raised again by the first use, where the command line reports it
    load_blas()  # before anything imports mlx.core

ROOMS = {
    "BatchGenerator": ".batch_generator",
    "DraftShape": ".decoding.state",
    "Engine": ".engine.engine",
    "Request": ".engine.engine",
    "Response": ".text",
    "Sampling": ".decoding.sampling",
    "Session": ".session",
    "SpeculativeModel": ".model",
    "generate": ".text",
    "load": ".model",
    "stream_generate": ".text",
}
__all__ = [
    "BatchGenerator",
    "DraftShape",
    "Engine",
    "Request",
    "Response",
    "Sampling",
    "Session",
    "SpeculativeModel",
    "generate",
    "load",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    """Import at first use: what takes seconds is not done before the command line can catch Ctrl-C."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    load_blas()
    return getattr(import_module(ROOMS[name], __name__), name)
