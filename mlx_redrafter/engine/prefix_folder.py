"""Texts kept for reuse, on the disk: found again when the program, or the machine, has been restarted.

    prefixes = Prefixes(2 << 30, PrefixFolder(folder, prefix_identity(model), 20 << 30))

A file holds a piece of a text: some tokens after those of another piece, or after some of these, and what
the layers remember of them. Its name tells model and text, so that one folder serves many models and
processes. Files are written by a thread of their own, under another name at first, and never changed. What
was used longest ago goes first; a piece counts as used when one after it is.
"""

import hashlib
import json
import os
import re
import time
import weakref
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from queue import Queue
from threading import Lock, Thread
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from safetensors import safe_open

from ..decoding.layers import Layers, Rows
from ..loading.files import atomic_file, check_writable
from ..loading.read import read_tensors
from . import backend

FORMAT = "1"
LONGEST_WAIT = 1 << 30  # bytes that may wait to be written; what comes then is not kept
NAME = "{identity}-{digest}.prefix.safetensors"
OURS = re.compile(r"[0-9a-f]{32}-[0-9a-f]{32}\.prefix\.safetensors")
DTYPES = {
    mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.int32: "I32", mx.uint32: "U32",
    mx.uint8: "U8", mx.int64: "I64", mx.bool_: "BOOL",
}  # fmt: skip
KINDS = {1: mx.uint8, 2: mx.uint16}  # integers as wide as other numbers

Tokens = np.ndarray[Any, np.dtype[np.int32]]
Arrays = dict[str, mx.array]


def prefix_identity(model: nn.Module, drafter: Any = None) -> str:
    """32 hexadecimal digits for all that decides what layers remember: weights, code, versions and device.

    All weights are read once.

    Args:
        drafter: counts only if it has a memory, which is one of the layers.
    """
    digest = hashlib.sha256(str((FORMAT, str(model), getattr(model, "args", None))).encode())
    versions = [metadata.version(name) for name in ("mlx", "mlx-lm", "mlx-redrafter")]
    digest.update(repr((versions, backend.current().name, backend.chip())).encode())
    weights: Any = tree_flatten(model.parameters())
    if drafter is not None and drafter.config.memory_heads:
        digest.update(repr(drafter.config).encode())
        weights += [(f"drafter.{name}", weight) for name, weight in drafter.weights().items()]
    for name, weight in sorted(weights, key=lambda pair: pair[0]):
        digest.update(repr((name, weight.shape, str(weight.dtype))).encode())
        if weight.size:
            table = weight.reshape(-1, *weight.shape[-1:]).view(KINDS.get(weight.dtype.size, mx.uint32))
            digest.update(np.array(mx.sum(table, axis=0)).tobytes())  # in integers, so that nothing is lost
    return digest.hexdigest()[:32]


@dataclass(eq=False)
class _Piece:
    """Some tokens [T], which come after the first ``after`` tokens of the piece above."""

    path: Path
    tokens: Tokens
    above: "_Piece | None" = None
    after: int = 0
    has_states: bool = False  # recurrent layers', after the last token
    is_written: bool = True
    below: list["_Piece"] = field(default_factory=list)

    def way(self, count: int) -> list[tuple["_Piece", int]]:
        """The pieces from the beginning of the text to this one, and how many tokens of each."""
        found, piece = [(self, count)], self
        while piece.above is not None:
            found.append((piece.above, piece.after))
            piece = piece.above
        return found[-2::-1]  # without the root


class PrefixFolder:
    """A folder of texts kept for reuse by one model, in which other models and programs keep theirs.

    One thread at a time may call it.

    Args:
        folder: made if need be.
        identity: of the model, see ``prefix_identity``.
        limit: bytes that files of all models may take.

    Raises:
        ValueError: the limit is negative, or nothing can be written to the folder.
    """

    def __init__(self, folder: Path, identity: str, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"prompt cache bytes {limit} is not usable: give 0 or more.")
        if not OURS.fullmatch(NAME.format(identity=identity, digest="0" * 32)):
            raise ValueError(f"{identity!r} is no identity of a model: take prefix_identity's.")
        check_writable(folder / "text")
        self.folder, self.identity, self.limit = folder, identity, limit
        self._lock = Lock()  # of all that follows
        self._root = _Piece(folder, np.zeros(0, np.int32))
        self._waiting = 0  # bytes
        self._queue: Queue[Any] = Queue()
        self._thread: Thread | None = None
        self._find_files()

    def _find_files(self) -> None:
        """Take in the pieces that are there. What has lost the piece above it, or is damaged, is removed."""
        pieces, above = {}, {}
        for path in self.folder.glob(NAME.format(identity=self.identity, digest="*")):
            try:
                with safe_open(path if path.is_file() else "", "numpy") as file:
                    told = json.loads(file.metadata()["prefix"])
                tokens = np.asarray(told["tokens"], np.int32).reshape(-1)
                pieces[path.name] = _Piece(path, tokens, None, int(told["after"]), bool(told["states"]))
                above[path.name] = str(told["above"])
            except Exception:  # anything may be there
                _remove(path)
        for name, piece in pieces.items():
            piece.above = pieces.get(above[name]) if above[name] else self._root
            if piece.above is not None and 0 <= piece.after <= len(piece.above.tokens):
                piece.above.below.append(piece)
        whole, left = set(), [(self._root, self._root.tokens)]
        while left:
            piece, text = left.pop()
            for below in list(piece.below):
                longer = np.concatenate([text[: len(text) - len(piece.tokens) + below.after], below.tokens])
                if self._path(longer) == below.path:
                    whole.add(below.path)
                    left.append((below, longer))
                else:  # the one above has been replaced by another piece that ends there
                    piece.below.remove(below)
        for piece in pieces.values():
            if piece.path not in whole:
                _remove(piece.path)

    def _path(self, tokens: Tokens) -> Path:
        """The file of the piece with which a text ends."""
        digest = hashlib.sha256(self.identity.encode() + tokens.astype("<i4").tobytes()).hexdigest()
        return self.folder / NAME.format(identity=self.identity, digest=digest[:32])

    def read(self, tokens: Tokens, more_than: int) -> tuple[int, Layers] | None:
        """The longest usable prefix of the tokens [T]: how many these are, and what layers remember of them.

        None: there are not ``more_than`` so many, or they cannot be read.
        """
        with self._lock:
            found = [(piece, n, total) for piece, n, total in self._matches(tokens) if _is_usable(piece, n)]
        piece, n, total = max(found, key=lambda match: match[2], default=(self._root, 0, 0))
        if total <= more_than:
            return None
        way = piece.way(n)
        rows: dict[str, list[mx.array]] = {}
        states: Arrays = {}
        for each, count in way:
            try:
                arrays = _read(each.path, len(each.tokens))
            except Exception:  # damaged, or removed by another process
                self._forget(each)
                return None
            states = {name: array for name, array in arrays.items() if name.startswith("states")}
            for name in arrays.keys() - states.keys() if count else ():
                rows.setdefault(name, []).append(arrays[name][:, :, :count])
        _touch([each.path for each, _ in way])
        joined = {name: mx.concatenate(parts, axis=2) for name, parts in rows.items()}
        return total, Layers(_nested(joined), states=_nested(states) if n == len(piece.tokens) else [])

    def missing(self, tokens: Tokens, with_states: bool) -> int | None:
        """How many of the tokens [T] the folder has, or soon will have; None if nothing is missing."""
        with self._lock:
            matches = self._matches(tokens, is_written=False)
        last, n, total = max(matches, key=lambda match: match[2])
        _touch([piece.path for piece, _ in last.way(n) if piece.is_written])
        ends = (piece.has_states and n == len(piece.tokens) for piece, n, count in matches if count == total)
        return None if total == len(tokens) and (not with_states or any(ends)) else total

    def write(
        self, tokens: Tokens, start: int, rows: Sequence[Rows], states: Sequence[Sequence[mx.array]]
    ) -> None:
        """Keep a text [T], soon: what is ``missing`` after ``start`` tokens, of which the rows are given."""
        named = {f"rows.{i}.{j}": part for i, parts in enumerate(rows) for j, part in enumerate(parts)}
        named |= {f"states.{i}.{j}": part for i, parts in enumerate(states) for j, part in enumerate(parts)}
        arrays = {name: (array, _bytes_of(array)) for name, array in named.items()}
        size = sum(data.nbytes for _, data in arrays.values())
        with self._lock:
            above, n, total = max(self._matches(tokens, is_written=False), key=lambda match: match[2])
            if total != start or size > self.limit or self._waiting + size > LONGEST_WAIT:
                return
            new = _Piece(self._path(tokens), tokens[start:].copy(), above, n, bool(states), is_written=False)
            above.below.append(new)
            self._waiting += size
        if self._thread is None:
            self._thread = Thread(target=_write_all, args=(self._queue,), daemon=True)
            self._thread.start()
            weakref.finalize(self, _end, self._queue)  # at the latest when the program ends
        self._queue.put((self, new, arrays, size))

    def flush(self) -> None:
        """Wait until everything is written."""
        self._queue.join()

    def _matches(self, tokens: Tokens, is_written: bool = True) -> list[tuple[_Piece, int, int]]:
        """The pieces that the tokens begin with, how many tokens of each, and how many up to there.

        Those above are not listed again.
        """
        found, left = [], [(self._root, 0, 0)]
        while left:
            piece, n, total = left.pop()
            found.append((piece, n, total))
            before = total - n
            for below in piece.below:
                rest = tokens[before + below.after :][: len(below.tokens)]
                if below.after <= n and (below.is_written or not is_written):
                    unlike = np.flatnonzero(below.tokens[: len(rest)] != rest)
                    same = int(unlike[0]) if len(unlike) else len(rest)
                    if same or not len(below.tokens):
                        left.append((below, same, before + below.after + same))
        return found

    def _save(self, piece: _Piece, arrays: dict[str, Any], size: int) -> None:
        """Write a piece, in the other thread; if this fails, nobody will look for it."""
        try:
            if piece.above is not None and not piece.above.is_written:
                raise OSError("the piece above it could not be written")
            self.folder.mkdir(0o700, parents=True, exist_ok=True)
            way = [each.path for each, _ in piece.way(len(piece.tokens))]
            header = _header(piece, arrays)
            self._make_room(len(header) + size, way)
            with atomic_file(piece.path) as temporary:
                _write(temporary, header, arrays)
            piece.is_written = True
            _touch(way)
        except Exception:  # of the disk, most likely; what is not kept is read again
            self._forget(piece)
        finally:
            with self._lock:
                self._waiting -= size

    def _make_room(self, size: int, needed: Sequence[Path]) -> None:
        """Remove what was used longest ago, of any model; ``OSError`` if that is not enough."""
        kept = []
        for path in self.folder.iterdir():
            with suppress(OSError):
                if OURS.fullmatch(path.name):
                    known = path.stat()
                    kept.append((known.st_mtime_ns, known.st_size, path))
        total = sum(length for _, length, _ in kept) + size
        removed = set()
        for _, length, path in sorted(kept):
            if total > self.limit and path not in needed:
                _remove(path)
                removed.add(path)
                total -= length
        for piece in _all_below(self._root):
            if piece.path in removed:
                self._forget(piece)
        if total > self.limit:
            raise OSError("the text is too long for the folder")

    def _forget(self, piece: _Piece) -> None:
        """Look no more for a piece, nor for those after it, and remove their files."""
        with self._lock:
            if piece.above is not None and piece in piece.above.below:
                piece.above.below.remove(piece)
        for each in (piece, *_all_below(piece)):
            each.is_written = False
            _remove(each.path)


def _write_all(queue: "Queue[Any]") -> None:
    while (work := queue.get()) is not None:
        folder, piece, arrays, size = work
        folder._save(piece, arrays, size)
        queue.task_done()
        del work, folder, piece, arrays  # or they would stay until the next text comes


def _end(queue: "Queue[Any]") -> None:
    queue.join()
    queue.put(None)


def _all_below(piece: _Piece) -> list[_Piece]:
    left, found = list(piece.below), []
    while left:
        found.append(left.pop())
        left += found[-1].below
    return found


def _is_usable(piece: _Piece, count: int) -> bool:
    """Recurrent layers cannot go back, so that they need all of a piece."""
    return not piece.has_states or count == len(piece.tokens)


def _nested(arrays: Arrays) -> list[Rows]:
    """Arrays by names such as rows.0.1, as lists by these numbers."""
    found: dict[int, dict[int, mx.array]] = {}
    for name, array in arrays.items():
        _, layer, part = name.split(".")
        found.setdefault(int(layer), {})[int(part)] = array
    return [[parts[j] for j in range(len(parts))] for parts in (found[i] for i in range(len(found)))]


def _touch(paths: Sequence[Path]) -> None:
    """Say that pieces were used just now: those above later than those below, which are to go first."""
    now = time.time_ns()
    for number, path in enumerate(reversed(paths)):
        with suppress(OSError):
            os.utime(path, ns=(now + number, now + number))


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


# --- Files -------------------------------------------------------------------------------------------


def _bytes_of(array: mx.array) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An array's bytes [n], which are not a copy where the device shares the memory."""
    return np.asarray(mx.contiguous(array).reshape(-1).view(mx.uint8))


def _header(piece: _Piece, arrays: dict[str, Any]) -> bytes:
    """What a safetensors file of a piece begins with."""
    checksum, position = 0, 0
    above = piece.above.path.name if piece.above is not None and piece.above.above is not None else ""
    told = {"tokens": piece.tokens.tolist(), "above": above, "after": piece.after, "states": piece.has_states}
    header: dict[str, Any] = {}
    for name, (array, data) in sorted(arrays.items()):
        checksum = zlib.crc32(data.data, checksum)
        offsets = [position, position := position + data.nbytes]
        header[name] = {"dtype": DTYPES[array.dtype], "shape": array.shape, "data_offsets": offsets}
    text = json.dumps({"__metadata__": {"prefix": json.dumps(told), "crc32": str(checksum)}, **header})
    encoded = text.encode().ljust(-(-len(text) // 8) * 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _write(path: Path, header: bytes, arrays: dict[str, Any]) -> None:
    """Write a file without MLX, and without holding on to Python's lock."""
    with path.open("wb") as file:
        file.write(header)
        for _, (_, data) in sorted(arrays.items()):
            file.write(data)


def _read(path: Path, count: int) -> Arrays:
    """The arrays of a file with rows of ``count`` tokens; ``ValueError`` if it is missing or damaged."""
    arrays, checksum = read_tensors(path), 0
    with safe_open(path, "numpy") as file:
        wanted = file.metadata()["crc32"]
    for name, array in sorted(arrays.items()):
        checksum = zlib.crc32(_bytes_of(array).data, checksum)
        if name.startswith("rows") and (array.ndim < 3 or array.shape[2] != count):
            raise ValueError(f"{path} is damaged: remove it.")
    if str(checksum) != wanted:
        raise ValueError(f"{path} is damaged: remove it.")
    return arrays
