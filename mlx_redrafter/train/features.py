"""What the drafter reads of the base model, at every position that it is trained on.

A drafter is trained at position t of a text if the model itself said token t + 1. From there on it
needs three things, stored as flat arrays, one run of positions after the other:

    context [M, F]   the model's hidden states at t (the first H columns are the last hidden state,
                     from which the model's own next-token distribution follows)
    token   [M]      token t + 1
    left    [M]      how many positions of the same run follow

So position i + d, if ``left[i] >= d``, has the tokens and the distribution d tokens later.

A drafter with a memory is shown all earlier tokens of the row too, whoever wrote them. So it needs all
positions of whole rows, of which ``left`` is -1 where it is not trained, and besides

    read [M]         token t
    place [M]        t
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..loading.files import atomic_file
from ..models.target import Target
from .data import Conversation
from .streams import Workers

CHUNK = 128  # tokens per forward pass: attention over fewer columns than in one pass over a row


@dataclass
class Features:
    """See above; ``context`` is bfloat16, ``token`` and ``left`` int32."""

    context: mx.array  # [M, F]
    token: mx.array  # [M]
    left: mx.array  # [M]

    @property
    def size(self) -> int:
        """M, the positions."""
        return int(self.token.size)


@dataclass
class WholeRows(Features):
    """All positions of whole rows; the last token of a row, which nothing follows, has none."""

    read: mx.array  # [M]
    place: mx.array  # [M]


def extract(target: Target, rows: Sequence[Conversation], workers: Workers, whole: bool = False) -> Features:
    """Run the model over some conversations.

    Args:
        target: the base model.
        rows: conversations, best of similar lengths (shorter ones are padded).
        workers: each does a part of the rows.
        whole: all positions, for a drafter with a memory.
    """
    parts = min(workers.count, len(rows))
    found = workers.map(lambda part: _extract(target, rows[part::parts], whole), parts)
    return join(found)


def _extract(target: Target, rows: Sequence[Conversation], whole: bool) -> Features:
    tokens = _pad([row.tokens for row in rows])  # [B, T]
    caches, hidden = target.make_cache(), []
    for start in range(0, tokens.shape[1], CHUNK):
        part = mx.array(tokens[:, start : start + CHUNK])
        hidden.append(target.forward(part, caches)[1].astype(mx.bfloat16))
        mx.eval(hidden[-1], [cache.state for cache in caches])
    return join([select(mx.concatenate(hidden, axis=1), rows, whole)])


def select(hidden: mx.array, rows: Sequence[Conversation], whole: bool = False) -> Features:
    """The positions to train on (or all), of hidden states [B, T, F] of rows of at most T tokens."""
    length = hidden.shape[1]
    index, token, left, read, place = [], [], [], [], []
    for number, row in enumerate(rows):
        after = row.trained[1:]  # after[t]: token t + 1 is the model's own
        places = np.arange(len(after)) if whole else np.flatnonzero(after)
        ends = np.flatnonzero(~np.append(after, False))  # every run ends where one of these comes
        index.append(number * length + places)
        token.append(row.tokens[1:][places])
        left.append(ends[np.searchsorted(ends, places)] - places - 1)
        read.append(row.tokens[places])
        place.append(places)
    flat = hidden.reshape(-1, hidden.shape[-1])
    chosen = flat[mx.array(np.concatenate(index).astype(np.int32))]
    arrays = (mx.array(np.concatenate(x).astype(np.int32)) for x in (token, left, read, place))
    return WholeRows(chosen, *arrays) if whole else Features(chosen, *itertools.islice(arrays, 2))


def join(parts: Sequence[Features]) -> Features:
    """All positions of several features."""
    joined = {name: mx.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])}
    mx.eval(joined)
    return type(parts[0])(**joined)


def write_features(path: Path, features: Features) -> None:
    """Write one shard; it appears whole or not at all."""
    with atomic_file(path) as temporary:
        mx.save_safetensors(str(temporary), vars(features))


def read_features(path: Path) -> Features:
    """Read a shard that ``write_features`` wrote."""
    arrays = load_tensors(path)[0]
    return WholeRows(**arrays) if "place" in arrays else Features(**arrays)


def load_tensors(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """A file of the work folder: its arrays and its metadata.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        mx.eval(loaded[0])  # or damage would show only later
        return loaded[0], loaded[1]
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: delete it and resume, it will be made again.") from error


def _pad(rows: Sequence[np.ndarray]) -> np.ndarray:
    padded = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded
