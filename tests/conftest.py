"""Tiny random models and the drafters that tests decode with."""

import os
import signal
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "MLX_REDRAFTER_CACHE" not in os.environ:
    folder = tempfile.TemporaryDirectory()  # converted models and step times, for this run of the tests only
    os.environ["MLX_REDRAFTER_CACHE"] = folder.name

import mlx_redrafter  # noqa: F401  (loads the BLAS before mlx)

# Ctrl-C is tested, and ignored by what a shell starts in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
