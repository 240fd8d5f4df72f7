"""Files and folders that appear whole or not at all."""

import fcntl
import os
import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".mlx-redrafter-"  # begins the names of temporary folders


@contextmanager
def atomic_folder(destination: Path, usable: Callable[[], bool] | None = None) -> Iterator[Path]:
    """Yield an empty folder near ``destination`` that takes its name when the block succeeds.

    Any exception (Ctrl-C and a full disk included) removes the temporary folder and leaves
    ``destination`` as it was. With ``usable``, one that is there by then is replaced unless it is usable.

    Raises:
        ValueError: ``destination`` exists already.
        OSError: the disk is full or not writable.
    """
    taken = ValueError(f"{destination} exists already: delete it or name another output folder.")
    if usable is None and destination.exists():
        raise taken
    above = next(folder for folder in destination.absolute().parents if folder.exists())
    with _writing(destination), unfinished(above) as old, unfinished(above) as new:
        yield new
        _sync(new)
        destination.parent.mkdir(parents=True, exist_ok=True)
        if destination.exists():
            if usable is None:
                raise taken
            if usable():  # another process was faster
                return
            destination.rename(old / destination.name)
        new.rename(destination)


@contextmanager
def atomic_file(destination: Path) -> Iterator[Path]:
    """Yield a path near ``destination``, of its name; the file written there takes its place at the end.

    Symbolic links are followed. What is not a file, such as a device or a pipe, is written to directly.

    Raises:
        OSError: the disk is full or not writable.
    """
    with _writing(destination):
        if destination.exists() and not destination.is_file():
            yield destination
            return
        target = destination.resolve()
        with unfinished(target.parent) as folder:
            yield folder / destination.name
            _sync(folder)
            (folder / destination.name).replace(target)


@contextmanager
def unfinished(parent: Path) -> Iterator[Path]:
    """Yield a new folder in ``parent`` that is removed at the end, unless renamed, and locked meanwhile.

    One that is not locked was left by a process that was killed, and is removed.
    """
    for left in parent.glob(UNFINISHED + "[0-9a-f]" * 8):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > 1:  # or it may just be about to be locked
                with _opened(left) as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left)
    folder = parent / f"{UNFINISHED}{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        with _opened(folder) as lock:
            with suppress(OSError):  # not every file system has locks
                fcntl.flock(lock, fcntl.LOCK_SH)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    """Have all data on the disk before a rename, or a power cut may leave empty files of the right name."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def _writing(destination: Path) -> Iterator[None]:
    """Say what cannot be written, whatever a library raises: MLX RuntimeError, tokenizers Exception."""
    try:
        yield
    except Exception as error:
        written = isinstance(error, OSError) or type(error) in (RuntimeError, Exception)
        if not written or isinstance(error, BrokenPipeError):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".")
        raise OSError(
            f"{destination} cannot be written ({reason}): make room on the disk, or write elsewhere."
        ) from error


def check_writable(path: str | Path) -> None:
    """Raise ``ValueError`` if nothing can be written as ``path``: before hours of work, not after them."""
    target = Path(path).resolve()
    parent = next(folder for folder in target.parents if os.path.exists(folder))  # False of too long a name
    if os.path.exists(target) and not target.is_file() and not target.is_dir():
        return  # a device, or a pipe
    try:
        with unfinished(parent) as folder:
            (folder / target.name).touch()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({parent}: {error.strerror}): name another place."
        ) from error


def shell_word(path: str | Path) -> str:
    """A file or folder as a word of a command line, which is not taken for a flag."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))
