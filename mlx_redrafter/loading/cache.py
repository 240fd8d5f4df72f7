"""Where what was made on this machine is kept: converted models, and notes of what was found out."""

import contextlib
import hashlib
import json
import math
import os
import time
from importlib import metadata
from pathlib import Path
from typing import Any

LARGEST = 1 << 20  # bytes of a note


def cache_folder() -> Path:
    """Where converted models and notes are kept: ``MLX_REDRAFTER_CACHE``, or the user's cache folder.

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


def versions() -> dict[str, str]:
    """Of all that decides how models are run."""
    return {name: metadata.version(name) for name in ("mlx", "mlx-lm", "mlx-redrafter")}


def write_note(kind: str, conditions: dict[str, Any], **note: Any) -> Path | None:
    """Keep what holds under these conditions, for ``age`` seconds if it says so; the file, or None."""
    with contextlib.suppress(OSError, RuntimeError):  # no home folder is a RuntimeError
        file = _file(kind, conditions)
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and not file.is_file():  # writing to a pipe would wait for its reader
            return None
        from .files import atomic_file

        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps({"conditions": conditions, **note}, indent=1) + "\n")
        return file
    return None


def read_note(kind: str, conditions: dict[str, Any], age: float = math.inf) -> dict[str, Any]:
    """What was kept under these conditions in the last ``age`` seconds; {} if there is no such thing."""
    with contextlib.suppress(OSError, RuntimeError):  # no home folder is a RuntimeError
        return _read(_file(kind, conditions), age)
    return {}


def notes(kind: str, age: float = math.inf) -> list[dict[str, Any]]:
    """All notes of a kind that were kept in the last ``age`` seconds, with their conditions."""
    with contextlib.suppress(OSError, RuntimeError):
        found = [_read(file, age) for file in sorted((cache_folder() / kind).glob("*.json"))]
        return [note for note in found if isinstance(note.get("conditions"), dict)]
    return []


def _read(file: Path, age: float) -> dict[str, Any]:
    with contextlib.suppress(Exception):  # anything may be there
        known = file.stat()
        if file.is_file() and known.st_size <= LARGEST:
            note = dict(json.loads(file.read_text()))
            return note if abs(time.time() - known.st_mtime) <= min(age, note.get("age", math.inf)) else {}
    return {}


def _file(kind: str, conditions: dict[str, Any]) -> Path:
    text = json.dumps(conditions, sort_keys=True)
    return cache_folder() / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
