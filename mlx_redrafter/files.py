"""Files and folders that appear whole or not at all."""

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".mlx-redrafter-"  # begins the name of what is still being written


@contextmanager
def atomic_folder(destination: Path, usable: Callable[[], bool] | None = None) -> Iterator[Path]:
    """Yield an empty folder beside ``destination`` that takes its name when the block succeeds.

    Any exception (Ctrl-C and a full disk included) removes the temporary folder and leaves
    ``destination`` as it was. With ``usable``, one that is there in the end makes way unless it is usable.

    Raises:
        ValueError: ``destination`` exists already.
        OSError: the disk is full or not writable.
    """
    if usable is None:
        _check_free(destination)
    with _writing(destination), _parents(destination), unfinished(destination.parent) as temporary:
        yield temporary
        for path in temporary.rglob("*"):
            _sync(path)
        old = temporary.with_name(f"{temporary.name}-old")
        if usable is not None and destination.exists():
            if usable():  # another process was faster
                return
            destination.rename(old)
        try:
            temporary.rename(destination)
        except OSError:
            _check_free(destination)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_file(destination: Path) -> Iterator[Path]:
    """Yield an empty file beside ``destination``, with its suffix, that takes its name in the end.

    A symbolic link stays one, and what it names is replaced; what is no file (a device, a pipe) is written
    to directly.

    Raises:
        OSError: the disk is full or not writable.
    """
    with _writing(destination):
        if destination.exists() and not destination.is_file():
            yield destination
            return
        target = destination.resolve()
        with unfinished(target.parent, destination.suffix) as temporary:
            yield temporary
            _sync(temporary)
            temporary.replace(target)


@contextmanager
def unfinished(parent: Path, suffix: str | None = None) -> Iterator[Path]:
    """Yield a new folder in ``parent``, or a file with this suffix; it is gone in the end unless renamed.

    It is locked meanwhile, so that what a killed process left behind is known, and removed here.
    """
    for stale in parent.glob(f"{UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - stale.stat().st_mtime > 1:  # a new one may not be locked yet
                os.close(_lock(stale))
                _remove(stale)
    path = parent / f"{UNFINISHED}{secrets.token_hex(4)}{suffix or ''}"
    path.mkdir() if suffix is None else path.touch(exist_ok=False)
    lock = None
    try:
        with suppress(OSError):  # not every file system has locks
            lock = _lock(path)
        yield path
    finally:
        _remove(path)
        if lock is not None:
            os.close(lock)


def _lock(path: Path) -> int:
    """A descriptor that locks ``path`` until it is closed; OSError if another process does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have the data on the disk before a rename, or a power cut may leave an empty file of that name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_free(destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise ValueError(f"{destination} exists already: delete it or name another output folder.")


@contextmanager
def _parents(destination: Path) -> Iterator[None]:
    """Make the folders above ``destination``; those that stay empty are removed again."""
    missing = [folder for folder in destination.absolute().parents if not folder.exists()]
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # it holds something
            for folder in missing:
                folder.rmdir()


@contextmanager
def _writing(destination: Path) -> Iterator[None]:
    """Say what cannot be written, whatever a library raises: MLX RuntimeError, tokenizers Exception."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            names = [str(name) for name in (error.filename, error.filename2) if name is not None]
            above = {str(folder) for folder in (*destination.parents, *destination.absolute().parents)}
            ours = not names or any(UNFINISHED in name or name in above for name in names)
        else:
            ours = type(error) in (RuntimeError, Exception)
        if not ours or isinstance(error, BrokenPipeError):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".")
        raise OSError(
            f"{destination} cannot be written ({reason}): make room on the disk, or write elsewhere."
        ) from error
