"""What a measurement was made on."""

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from ..blas import load_blas
from ..engine import backend

PACKAGE = Path(__file__).parent.parent


def describe() -> dict[str, Any]:
    """The machine, its software, and how busy it was at the beginning."""
    blas = load_blas()
    return {
        "chip": backend.chip(),
        "backend": backend.current().name,
        "os": platform.platform(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "blas": None if blas is None else Path(blas).name,
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("mlx", "mlx-lm", "mlx-redrafter")},
        "git": git_hash(),
    }


def git_hash() -> str | None:
    """The commit this package is a checkout of, "-dirty" if it was changed; None if it is no checkout."""
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:  # perhaps another project's checkout
        return None
    commit = _git("rev-parse", "HEAD")
    return f"{commit}-dirty" if commit and _git("status", "--porcelain", "--", ".") else commit


def _git(*arguments: str) -> str | None:
    """What git prints, run in the package's folder; None if it fails."""
    command = ["git", "-C", str(PACKAGE), *arguments]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10).strip()
    return None
