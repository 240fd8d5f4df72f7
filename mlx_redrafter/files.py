"""Files that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``destination`` that takes its name when the block succeeds.

    Any exception (Ctrl-C and a full disk included) removes the temporary folder and leaves nothing
    at ``destination``. If another process finished the same folder first, its result is kept.

    Raises:
        ValueError: ``destination`` exists already.
    """
    if destination.exists():
        raise ValueError(f"{destination} exists already: delete it or name another output folder.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes private folders
        try:
            temporary.rename(destination)
        except OSError:
            if not destination.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(destination: Path) -> Iterator[Path]:
    """Yield a path beside ``destination``, with its suffix; the file written there takes its name in the end.

    Raises:
        OSError: the disk is full or not writable (MLX raises RuntimeError then).
    """
    temporary = destination.with_name(f"new-{destination.name}")
    try:
        yield temporary
        temporary.replace(destination)
    except RuntimeError as error:
        raise OSError(
            f"{destination} cannot be written ({error}): make room on the disk, or write elsewhere."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
