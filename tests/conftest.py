"""Tiny random models and the drafters that tests decode with."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import mlx_redrafter  # noqa: F401  (loads the BLAS before mlx)

# Ctrl-C is tested, and ignored by what a shell starts in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
