"""A fast BLAS for MLX on Linux CPUs.

MLX's Linux CPU wheel links the reference BLAS, about ten times slower than OpenBLAS. A BLAS that is
loaded globally before ``mlx.core`` takes its place, so importing this package loads the OpenBLAS of
the ``cmeel-openblas`` package first. Elsewhere (macOS has Accelerate) this does nothing.

``MLX_REDRAFTER_BLAS`` names another library to load, or is ``off``.
"""

import contextlib
import ctypes
import functools
import os
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path

VARIABLE = "MLX_REDRAFTER_BLAS"


@functools.cache
def load_blas() -> str | None:
    """Load the BLAS that MLX should use; return its path, or None where MLX keeps its own.

    Raises:
        ValueError: ``MLX_REDRAFTER_BLAS`` names a library that cannot be loaded.
    """
    choice = os.environ.get(VARIABLE, "")
    if not sys.platform.startswith("linux") or choice.lower() in ("off", "0", "none"):
        return None
    path = choice or next(iter(packaged("cmeel-openblas", "libopenblas.so")), None)
    if path is None:
        return None
    if "mlx.core" in sys.modules:
        _warn("mlx.core was imported before mlx_redrafter: import mlx_redrafter first.")
        return None
    try:
        _load(path)
    except OSError as error:
        if choice:
            raise ValueError(
                f"{VARIABLE}={choice} cannot be loaded ({error}): name a BLAS or 'off'."
            ) from error
        _warn(f"{path} cannot be loaded ({error}).")
        return None
    return path


def set_blas_threads(count: int) -> None:
    """Let each matrix product use ``count`` threads, where the loaded BLAS is an OpenBLAS."""
    path = load_blas()
    if path is not None:
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(path).openblas_set_num_threads(count)


def blas_threads() -> int | None:
    """How many threads a matrix product uses, whatever set it; None where no OpenBLAS was loaded."""
    path = load_blas()
    count = getattr(path and ctypes.CDLL(path), "openblas_get_num_threads", None)
    return None if count is None else int(count())


def _load(path: str) -> None:
    try:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        if "libgfortran" not in str(error):
            raise
        _load_gfortran()
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def _load_gfortran() -> None:
    """Load the Fortran runtime inside MLX's wheel under the plain name that OpenBLAS asks for.

    The wheel's copy carries a name of its own (``libgfortran-1a2b.so.5``), by which the loader does
    not recognise it; so a temporary copy gets the plain name written over that one.
    """
    for quadmath in packaged("mlx-cpu", "libquadmath"):
        ctypes.CDLL(quadmath)
    for path in packaged("mlx-cpu", "libgfortran"):
        name = Path(path).name.encode()
        renamed = Path(path).read_bytes().replace(name, b"libgfortran.so.5".ljust(len(name), b"\0"))
        with tempfile.NamedTemporaryFile(suffix=".so") as copy:
            copy.write(renamed)
            copy.flush()
            ctypes.CDLL(copy.name, mode=ctypes.RTLD_GLOBAL)


def packaged(package: str, prefix: str) -> list[str]:
    """Paths of the installed ``package``'s files whose names start with ``prefix``."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return []
    paths = [Path(str(file.locate())) for file in files if file.name.startswith(prefix)]
    return [str(path) for path in paths if path.exists()]


def _warn(reason: str) -> None:
    warnings.warn(f"MLX keeps its slow reference BLAS: {reason}", RuntimeWarning, stacklevel=4)
