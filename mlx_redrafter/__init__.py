"""Faster text generation on Apple Silicon that says exactly what the model would have said."""

from .blas import load_blas

load_blas()  # before anything imports mlx.core

from .decoding.sampling import Sampling  # noqa: E402
from .decoding.step import DraftShape  # noqa: E402
from .model import SpeculativeModel, load  # noqa: E402
from .stream import Response, generate, stream_generate  # noqa: E402

__all__ = ["DraftShape", "Response", "Sampling", "SpeculativeModel", "generate", "load", "stream_generate"]
