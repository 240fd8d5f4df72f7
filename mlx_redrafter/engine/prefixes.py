"""Texts kept for reuse: what the layers remember of them, found by the tokens that a prompt begins with.

    prefixes = Prefixes(2 << 30)  # bytes; one for each model
    engine = model.engine(policy, prefixes=prefixes)
    number = engine.submit(request)  # reads only what comes after the longest prefix that is kept
    request.cached_tokens  # tokens of its prompt that were not read, known once its first token is there

An engine keeps every prompt once it has been read, every text when it ends or is cancelled, and what was
read at a request's ``checkpoints``. A text's tokens are the same with and without: what the drafter reads
and what may be copied come from the tokens, which a request has all of.

Texts that begin alike share what they have in common: they are a tree of pieces, and a lookup may end in the
middle of one. Recurrent layers' states are known at the ends of prompts and at checkpoints only, and with
these a lookup ends there. Layers that attend to a window forget the first rows of a long answer; a lookup
ends where all of a window is known. What was used longest ago goes first.

With a ``PrefixFolder``, texts are kept on the disk too, and read from there when memory has less of them.

Left alone are requests that bring caches of their own, whose tokens are not known, and those whose keys and
values are quantized: where mlx-lm quantizes depends on how a prompt is read.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..decoding.layers import Layers, Rows
from ..models.prompt_caches import fill
from ..models.target import windows_of
from . import backend

if TYPE_CHECKING:
    from .prefix_folder import PrefixFolder

SHARE = 0.25  # of the memory that texts may take

Tokens = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(eq=False)
class _Piece:
    """Some tokens [T] after those of the piece above, and what the layers remember of them alone."""

    tokens: Tokens
    # Rows [1, Hkv, T, ...], of windows the last ones that are known; recurrent layers' states after the last
    # token, where they are known.
    layers: Layers
    above: "_Piece | None" = None
    below: dict[int, "_Piece"] = field(default_factory=dict)  # by their first token
    used: int = 0

    @property
    def nbytes(self) -> int:
        return self.layers.nbytes


class Prefixes:
    """Texts kept for reuse by engines of one model, which must not change meanwhile.

    One thread at a time may call it: the one that calls the engine.

    Args:
        limit: bytes that may be kept; 0 keeps nothing, None is a quarter of the memory that is free now.
        folder: of the same model, keeps on the disk what is kept here.

    Attributes:
        same: whether other machines have as many tokens of a prompt, where each keeps other layers.

    Raises:
        ValueError: the limit is negative.
    """

    same: Callable[[int], bool] = staticmethod(lambda count: True)

    def __init__(self, limit: int | None = None, folder: "PrefixFolder | None" = None) -> None:
        self.limit = int(SHARE * backend.free_memory()) if limit is None else limit
        if self.limit < 0:
            raise ValueError(f"prompt cache bytes {limit} is not usable: give 0 or more.")
        self._clock = itertools.count(1)
        self._folder: PrefixFolder | None
        self._drafter: list[object] = []  # whose memory is kept too, once it is known
        self.clear()
        self._folder = folder

    def clear(self) -> None:
        """Forget everything, and use no folder any more: the model may have changed."""
        self._folder = None
        self._root = _Piece(np.zeros(0, np.int32), Layers([]))
        self._nbytes, self._recurrent = 0, False

    def belong_to(self, drafter: object) -> None:
        """Forget what was kept with another drafter's memory, or with none (None)."""
        if self._drafter not in ([], [drafter]):
            self.clear()
        self._drafter = [drafter]

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self._nbytes

    def restore(self, tokens: Sequence[int], caches: list[Any]) -> int:
        """Give empty mlx-lm caches the longest usable prefix of the tokens; how many tokens it has."""
        ids = np.asarray(tokens, np.int32)
        found = self._usable(self._walk(ids))
        if self._folder is not None and (longer := self._folder.read(ids, _count(found))) is not None:
            count, layers = longer
            self._keep(ids[:count], replace(layers, windows=windows_of(caches)))
            found = self._usable(self._walk(ids))
        if not self.same(_count(found)):
            found = []
        if found:
            fill(caches, replace(found[-1][0].layers, rows=_rows(found, ends_only=True)), _count(found))
        return _count(found)

    def keep(self, tokens: Sequence[int], layers: Layers, exact: bool = True) -> None:
        """Keep what the layers of one text, ``in_order``, remember of the tokens.

        Only what is not kept yet is copied. The layers' lists are emptied on the way, so that no two copies
        of all are in memory at once. Recurrent layers' are kept only if ``exact``: their states are those
        after the last of the tokens.
        """
        ids, with_states = np.asarray(tokens, np.int32), bool(layers.states)
        if with_states and not exact:
            return
        self._keep(ids, layers)
        if self._folder is not None and (start := self._folder.missing(ids, with_states)) is not None:
            found = self._walk(ids)
            rows = _rows(found, start) if start < _count(found) else []
            # Or it did not fit into memory, or a window forgot some of it.
            if _count(found) == len(ids) and all(parts[0].shape[2] == len(ids) - start for parts in rows):
                states = found[-1][0].layers.states if with_states else []
                self._folder.write(ids, start, rows, states)

    def _keep(self, ids: Tokens, layers: Layers) -> None:
        found, states = self._walk(ids), layers.states
        place, held = (found[-1][0] if found else self._root), _count(found)
        self._recurrent = bool(states)
        if held == len(ids) and (not states or not held or _ends_with_states(*found[-1])):
            return
        size = lambda part: part.nbytes // part.shape[2] * min(part.shape[2], len(ids) - held)  # noqa: E731
        new = sum(size(part) for rows in layers.rows for part in rows)
        new += sum(part.nbytes for parts in states for part in parts)
        if new + sum(piece.nbytes for piece, _ in found) > self.limit:
            return
        self._make_room(new)
        self._nbytes += new
        if held and found[-1][1] < len(place.tokens):
            place = self._split(place, found[-1][1])
            found[-1] = place, len(place.tokens)
        if held == len(ids):
            place.layers = replace(layers, rows=place.layers.rows)
            return
        self._complete([piece for piece, _ in found], layers, len(ids))
        (part,) = _cut(layers, held, len(ids))
        kept = replace(layers, rows=part.rows)
        place.below[int(ids[held])] = _Piece(ids[held:], kept, place, used=next(self._clock))
        self._make_room(0)

    def _usable(self, found: list[tuple[_Piece, int]]) -> list[tuple[_Piece, int]]:
        """The first of these pieces, up to where all is known that the layers need to go on."""
        while found and self._recurrent and not _ends_with_states(*found[-1]):
            found = found[:-1]
        back = 0  # tokens from the end to the start of a piece
        for place, (piece, n) in reversed(list(enumerate(found))):
            for rows, window in zip(piece.layers.rows, piece.layers.windows, strict=True):
                if window is not None and _known(rows[0], piece, n) < min(n, window - back):
                    return self._usable(found[:place])
            back += n
        return found

    def _complete(self, pieces: list[_Piece], layers: Layers, end: int) -> None:
        """Let the pieces know what the layers know of the last rows of a text of ``end`` tokens."""
        for number, window in enumerate(layers.windows):
            start, rows = 0, layers.rows[number]
            first = end - rows[0].shape[2]  # of its places
            for piece in pieces if window is not None else ():
                start, since = start + len(piece.tokens), max(start, first)
                mine = piece.layers.rows[number]
                if start - since > mine[0].shape[2]:
                    self._nbytes -= sum(part.nbytes for part in mine)
                    mine[:] = [mx.contiguous(part[:, :, since - first : start - first]) for part in rows]
                    mx.eval(mine)
                    self._nbytes += sum(part.nbytes for part in mine)

    def _walk(self, tokens: Tokens) -> list[tuple[_Piece, int]]:
        """The pieces that the tokens begin with, one after the other, and how many tokens of each."""
        piece, found = self._root, []
        while len(tokens) and (following := piece.below.get(int(tokens[0]))) is not None:
            piece, following.used = following, next(self._clock)
            both = min(len(tokens), len(piece.tokens))
            unlike = np.flatnonzero(piece.tokens[:both] != tokens[:both])
            found.append((piece, int(unlike[0]) if len(unlike) else both))
            if found[-1][1] < len(piece.tokens):
                break
            tokens = tokens[both:]
        return found

    def _split(self, piece: _Piece, count: int) -> _Piece:
        """Cut a piece after its first tokens; these, as a piece above it."""
        assert piece.above is not None
        first, rest = _cut(piece.layers, 0, count, len(piece.tokens))
        head = _Piece(piece.tokens[:count], first, piece.above, used=piece.used)
        piece.above.below[int(head.tokens[0])] = head
        piece.tokens, piece.above = piece.tokens[count:], head
        piece.layers = replace(piece.layers, rows=rest.rows)
        head.below[int(piece.tokens[0])] = piece
        return head

    def _make_room(self, new: int) -> None:
        """Drop the pieces that were used longest ago."""
        while self._nbytes + new > self.limit:
            piece = min(self._ends(self._root), key=lambda piece: piece.used)
            assert piece.above is not None
            del piece.above.below[int(piece.tokens[0])]
            self._nbytes -= piece.nbytes

    def _ends(self, piece: _Piece) -> list[_Piece]:
        """The pieces that nothing comes after."""
        below = piece.below.values()
        return [end for each in below for end in self._ends(each)] if below else [piece]


def _count(found: Sequence[tuple[_Piece, int]]) -> int:
    return sum(n for _, n in found)


def _rows(found: Sequence[tuple[_Piece, int]], start: int = 0, ends_only: bool = False) -> list[Rows]:
    """The rows of pieces, one after the other, from one row on: those that are known.

    Args:
        ends_only: of windows, the last ones.
    """
    rows: list[Rows] = []
    for number, window in enumerate(found[-1][0].layers.windows):
        since = max(start, _count(found) - window) if window is not None and ends_only else start
        shown, before = [], 0
        for piece, n in found:
            parts, first = piece.layers.rows[number], max(since - before, 0)
            before += n
            if first < n:
                last = n if window is None else _known(parts[0], piece, n)
                shown.append([part[:, :, max(last - n + first, 0) : last] for part in parts])
        rows.append([mx.concatenate(list(x), axis=2) for x in zip(*shown, strict=True)])
    return rows


def _ends_with_states(piece: _Piece, count: int) -> bool:
    return count == len(piece.tokens) and bool(piece.layers.states)


def _known(part: mx.array, piece: _Piece, count: int) -> int:
    """How many rows a piece has of its first tokens."""
    return max(int(part.shape[2]) - len(piece.tokens) + count, 0)


def _cut(layers: Layers, *ends: int) -> list[Layers]:
    """Copies of the rows from each of the ends to the next, up to the text's; the lists are emptied."""
    found = [replace(layers, rows=[], states=[]) for _ in ends[1:]]
    for parts, window in zip(layers.rows, layers.windows, strict=True):
        for each, (start, end) in zip(found, itertools.pairwise(ends), strict=True):
            before = 0 if window is None else ends[-1] - parts[0].shape[2]  # tokens whose rows are not known
            first, last = max(start - before, 0), max(end - before, 0)
            each.rows.append([mx.contiguous(part[:, :, first:last]) for part in parts])
            mx.eval(each.rows[-1])
        parts.clear()
    return found
