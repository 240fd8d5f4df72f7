"""Where what was made on this machine is kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where converted models and step times are kept: ``MLX_REDRAFTER_CACHE``, or the user's cache folder.

    Raises:
        OSError: nothing says where.
    """
    if folder := os.environ.get("MLX_REDRAFTER_CACHE"):
        return Path(os.path.expanduser(folder))
    folder = os.environ.get("XDG_CACHE_HOME", "")
    folder = folder if os.path.isabs(folder) else os.path.expanduser("~/.cache")  # as its standard says
    if not os.path.isabs(folder):
        raise OSError("there is no home folder to keep converted models in: set MLX_REDRAFTER_CACHE to one.")
    return Path(folder) / "mlx-redrafter"
