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


def commit(cache: Cache) -> Cache:
    """Write the last path's rows to their places; rows beyond the accepted ones are never read."""
    if cache.path_start is None:
        return cache
    return Cache(
        [write_rows(*layer, cache.path_start) for layer in zip(cache.keys, cache.path_keys, strict=True)],
        [write_rows(*layer, cache.path_start) for layer in zip(cache.values, cache.path_values, strict=True)],
    )


def leave_path(
    keys: list[mx.array],
    values: list[mx.array],
    node_keys: Sequence[mx.array],
    node_values: Sequence[mx.array],
    path: mx.array,
    start: mx.array,
) -> Cache:
    """A cache with the buffers as they are and the path's rows to be committed.

    Args:
        keys: per layer [B, Hkv, C, D], and so ``values``.
        node_keys: per layer [B, Hkv, N, D], rows of the verified nodes, and so ``node_values``.
        path: [B, D+1], the accepted nodes.
        start: [B], where the root's row belongs.
    """
    index = path[:, None, :, None]  # [B, 1, D+1, 1]
    return Cache(
        keys,
        values,
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


def grow(cache: Cache, capacity: int) -> Cache:
    """The committed cache with room for ``capacity`` rows."""
    cache = commit(cache)
    missing = capacity - cache.capacity
    if missing <= 0:
        return cache
    pad = [(0, 0), (0, 0), (0, missing), (0, 0)]
    return Cache([mx.pad(k, pad) for k in cache.keys], [mx.pad(v, pad) for v in cache.values])


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
