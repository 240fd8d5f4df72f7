"""Tiny random models and the drafters that tests decode with."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import mlx_redrafter  # noqa: F401  (loads the BLAS before mlx)
