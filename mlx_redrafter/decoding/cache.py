"""Keys and values in fixed buffers whose length lives on the device.

Writing to a buffer is in place only while nothing else reads it, and attention reads the buffers in
every step. So a step does not move the accepted nodes' rows itself: it leaves them in ``path_keys``
and ``path_values``, and the next step's first act is to ``commit`` them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from .tree import Tree


@dataclass
class Cache:
    """Keys and values of every layer, and the rows of the last path that are not in them yet."""

    keys: list[mx.array]  # per layer [B, Hkv, C, D]
    values: list[mx.array]  # per layer [B, Hkv, C, D]
    path_keys: list[mx.array] = field(default_factory=list)  # per layer [B, Hkv, D+1, D], or none
    path_values: list[mx.array] = field(default_factory=list)
    path_start: mx.array | None = None  # [B] where the path's rows belong

    @property
    def capacity(self) -> int:
        """Rows that the buffers have room for."""
        return int(self.keys[0].shape[2])


@dataclass(frozen=True)
class View:
    """What attention is shown of the buffers.

    Attributes:
        columns: the first rows, at least the text's and the nodes'.
        exact: all of them are the text's or the nodes', so that a single node needs no mask.
    """

    columns: int
    exact: bool = False


def commit(cache: Cache) -> Cache:
    """Write the last path's rows to their places; rows beyond the accepted ones are never read."""
    if cache.path_start is None:
        return cache
    return Cache(
        [write_rows(*layer, cache.path_start) for layer in zip(cache.keys, cache.path_keys, strict=True)],
        [write_rows(*layer, cache.path_start) for layer in zip(cache.values, cache.path_values, strict=True)],
    )


def leave_path(
    cache: Cache,
    node_keys: Sequence[mx.array],
    node_values: Sequence[mx.array],
    path: mx.array,
    start: mx.array,
) -> Cache:
    """The cache with its buffers as they are and the path's rows to be committed.

    Args:
        cache: its buffers hold the nodes' rows.
        node_keys: per layer [B, Hkv, N, D], rows of the verified nodes, and so ``node_values``.
        path: [B, D+1], the accepted nodes.
        start: [B], where the root's row belongs.
    """
    index = path[:, None, :, None]  # [B, 1, D+1, 1]
    return Cache(
        cache.keys,
        cache.values,
        [mx.take_along_axis(rows, index, axis=2) for rows in node_keys],
        [mx.take_along_axis(rows, index, axis=2) for rows in node_values],
        start,
    )


def write_rows(buffer: mx.array, rows: mx.array, start: mx.array) -> mx.array:
    """``buffer`` [B, Hkv, C, D] with ``rows`` [B, Hkv, n, D] at ``start`` [B] of each batch row."""
    rows = rows.astype(buffer.dtype)
    if buffer.shape[0] == 1:
        return mx.slice_update(buffer, rows, start, axes=(2,))
    place = start[:, None] + mx.arange(rows.shape[2])  # [B, n]
    return mx.put_along_axis(buffer, mx.broadcast_to(place[:, None, :, None], rows.shape), rows, axis=2)


def write_tokens(history: mx.array, tokens: mx.array, start: mx.array) -> mx.array:
    """``history`` [B, C] with ``tokens`` [B, n] at ``start`` [B] of each row."""
    tokens = tokens.astype(history.dtype)
    if history.shape[0] == 1:
        return mx.slice_update(history, tokens, start, axes=(1,))
    return mx.put_along_axis(history, start[:, None] + mx.arange(tokens.shape[1]), tokens, axis=1)


def grow(cache: Cache, capacity: int) -> Cache:
    """The committed cache with room for ``capacity`` rows.

    Layer by layer, and in ``cache``'s own lists, so that no two caches are in memory at once.
    """
    if capacity <= cache.capacity:
        return commit(cache)
    padding = [(0, 0), (0, 0), (0, capacity - cache.capacity), (0, 0)]
    for buffers, path in ((cache.keys, cache.path_keys), (cache.values, cache.path_values)):
        for i in range(len(buffers)):
            if cache.path_start is not None:
                buffers[i] = write_rows(buffers[i], path[i], cache.path_start)
            buffers[i] = mx.pad(buffers[i], padding)
            mx.eval(buffers[i])
    return Cache(cache.keys, cache.values)


def visible(tree: Tree, length: mx.array, capacity: int, window: int | None = None) -> mx.array:
    """Which rows of the buffers each node attends to: the text so far and the node's ancestors.

    Args:
        tree: N nodes, whose rows are at ``length`` and after.
        length: [B], rows of the text so far.
        capacity: C, rows of the buffers.
        window: attend only to this many last positions, the node's own included.

    Returns:
        [B, N, C] bool.
    """
    nodes = tree.tokens.shape[1]
    column = mx.arange(capacity)
    node = column - length[:, None]  # [B, C]: the node whose row it is; negative: the text
    inside = mx.clip(node, 0, nodes - 1)
    index = mx.broadcast_to(inside[:, None], (*tree.tokens.shape, capacity))
    above = mx.take_along_axis(tree.ancestors, index, axis=2)  # [B, N, C]
    mask = (node < 0)[:, None] | (above & ((node >= 0) & (node < nodes))[:, None])
    if window is None:
        return mask
    position = mx.where(node < 0, column, length[:, None] + mx.take_along_axis(tree.depths, inside, axis=1))
    own = length[:, None] + tree.depths  # [B, N]
    return mask & (own[..., None] - position[:, None] < window)
