"""What the target's layers remember of B texts.

Attention keeps rows, in fixed buffers whose length lives on the device. Writing to a buffer is in place only
while nothing else reads it, and attention reads the buffers in every step. So a step does not move the
accepted nodes' rows itself: it leaves them in ``path``, and the next step's first act is to ``commit`` them.

Recurrent layers keep states, whose size does not depend on the text. Nothing is written into these: a step
replaces them with those after the accepted nodes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx

from .tree import Tree

Rows = list[
    mx.array
]  # of one layer, each [B, Hkv, C, ...]: keys and values; if quantized, three parts of each


@dataclass(frozen=True)
class Quantization:
    """How mlx-lm quantizes keys and values.

    Attributes:
        bits: of each number.
        group_size: numbers along Dh that share a scale and a bias.
        start: tokens that the layers hold before they are quantized.
    """

    bits: int
    group_size: int = 64
    start: int = 0


@dataclass
class Layers:
    """The buffers of every layer, and the rows of the last path that are not in them yet."""

    rows: list[Rows]  # C rows of each text
    path: list[Rows] = field(default_factory=list)  # L + 1 rows of each, or none
    path_start: mx.array | None = None  # [B] where the path's rows belong
    states: list[list[mx.array]] = field(default_factory=list)  # of each recurrent layer, each [B, ...]

    @property
    def capacity(self) -> int:
        """C, rows of each text that the buffers have room for; 0 if no layer keeps rows."""
        return int(self.rows[0][0].shape[2]) if self.rows else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers and the states."""
        return sum(part.nbytes for parts in (*self.rows, *self.states) for part in parts)


@dataclass(frozen=True)
class View:
    """What attention is shown of the buffers.

    Attributes:
        columns: the first rows, at least the text's and the nodes'.
        exact: all of them are the text's or the nodes', so that a single node needs no mask.
    """

    columns: int
    exact: bool = False


def commit(layers: Layers) -> Layers:
    """Write the last path's rows to their places; rows after the accepted ones are never read."""
    if layers.path_start is None:
        return layers
    start = layers.path_start
    pairs = zip(layers.rows, layers.path, strict=True)
    rows = [[write_rows(buffer, rows, start) for buffer, rows in zip(*pair, strict=True)] for pair in pairs]
    return Layers(rows, states=layers.states)


def leave_path(layers: Layers, nodes: Sequence[Rows], path: mx.array, start: mx.array) -> Layers:
    """The layers with their buffers as they are and the path's rows to be committed.

    Args:
        layers: the buffers hold the nodes' rows.
        nodes: per layer [B, Hkv, N, ...], rows of the verified nodes.
        path: [B, L+1], the accepted nodes.
        start: [B], where the root's row belongs.
    """
    index = path[:, None, :, None]  # [B, 1, L+1, 1]
    left = [[mx.take_along_axis(part, index, axis=2) for part in rows] for rows in nodes]
    return replace(layers, path=left, path_start=start)


def write_rows(buffer: mx.array, rows: mx.array, start: mx.array) -> mx.array:
    """``buffer`` [B, Hkv, C, ...] with ``rows`` [B, Hkv, n, ...] at ``start`` [B] of each text."""
    rows = rows.astype(buffer.dtype)
    if buffer.shape[0] == 1:
        return mx.slice_update(buffer, rows, start, axes=(2,))
    place = start[:, None] + mx.arange(rows.shape[2])  # [B, n]
    return mx.put_along_axis(buffer, mx.broadcast_to(place[:, None, :, None], rows.shape), rows, axis=2)


def write_tokens(history: mx.array, tokens: mx.array, start: mx.array) -> mx.array:
    """``history`` [B, C] with ``tokens`` [B, n] at ``start`` [B] of each text."""
    tokens = tokens.astype(history.dtype)
    if history.shape[0] == 1:
        return mx.slice_update(history, tokens, start, axes=(1,))
    return mx.put_along_axis(history, start[:, None] + mx.arange(tokens.shape[1]), tokens, axis=1)


def fit_rows(layers: Layers, capacity: int) -> Layers:
    """The committed layers with room for exactly ``capacity`` rows."""
    return _rebuilt(layers, lambda buffer: _fitted(buffer, capacity))


def take_rows(layers: Layers, texts: mx.array, capacity: int) -> Layers:
    """The committed layers of the ``texts`` [M], by number, with room for exactly ``capacity`` rows."""
    taken = _rebuilt(layers, lambda buffer: _fitted(buffer[:, :, :capacity][texts], capacity))
    return replace(taken, states=[[state[texts] for state in states] for states in layers.states])


def join_rows(parts: Sequence[Layers]) -> Layers:
    """The committed layers of all texts together, in place of the given ones of one capacity."""
    joined: list[Rows] = []
    for layer in range(len(parts[0].rows)):
        rows = [mx.concatenate(list(x)) for x in zip(*(each.rows[layer] for each in parts), strict=True)]
        mx.eval(rows)
        joined.append(rows)
        for each in parts:
            each.rows[layer] = []
    states = [
        [mx.concatenate(list(x)) for x in zip(*of_each, strict=True)]
        for of_each in zip(*(each.states for each in parts), strict=True)
    ]
    return Layers(joined, states=states)


def one_text(layers: Layers, number: int) -> Layers:
    """The committed layers of one text."""
    rows, states = (
        [[x if x.shape[0] == 1 else x[number : number + 1] for x in parts] for parts in all_parts]
        for all_parts in (layers.rows, layers.states)
    )
    return Layers(rows, states=states)


def quantized(layers: Layers, how: Quantization) -> Layers:
    """The committed layers with keys and values quantized, in place of the given ones, one at a time."""
    for number, rows in enumerate(layers.rows):
        layers.rows[number] = [part for array in rows for part in quantized_rows(array, how)]
        mx.eval(layers.rows[number])
    return Layers(layers.rows, states=layers.states)


def quantized_rows(rows: mx.array, how: Quantization) -> list[mx.array]:
    """Rows [B, Hkv, n, Dh] packed, their scales and their biases, each [B, Hkv, n, ...]."""
    return list(mx.quantize(rows, group_size=how.group_size, bits=how.bits))


def quantization_of(packed: mx.array, scales: mx.array, size: int) -> Quantization:
    """How rows of ``size`` numbers are quantized. Their widths tell: compiled steps are given arrays only."""
    return Quantization(32 * packed.shape[-1] // size, size // scales.shape[-1])


def _rebuilt(layers: Layers, change: Callable[[mx.array], mx.array]) -> Layers:
    """The committed layers with every buffer changed; one at a time and in the same lists, so that no
    two copies of all are in memory at once."""
    for number, rows in enumerate(layers.rows):
        for part in range(len(rows)):
            if layers.path_start is not None:
                rows[part] = write_rows(rows[part], layers.path[number][part], layers.path_start)
            rows[part] = change(rows[part])
            mx.eval(rows[part])
    return Layers(layers.rows, states=layers.states)


def _fitted(buffer: mx.array, capacity: int) -> mx.array:
    missing = capacity - buffer.shape[2]
    if missing <= 0:
        return mx.contiguous(buffer[:, :, :capacity]) if missing < 0 else buffer
    return mx.pad(buffer, [(0, 0), (0, 0), (0, missing), (0, 0)])


def visible(tree: Tree, start: mx.array, columns: int, window: int | None = None) -> mx.array:
    """Which rows of the buffers each node attends to: the text so far and the node's ancestors.

    Args:
        tree: N nodes, whose rows are at ``start`` and after.
        start: [B], where the root's row belongs: rows of the text so far.
        columns: C, rows of the buffers that are shown.
        window: attend only to this many last positions, the node's own included.

    Returns:
        [B, N, C] bool.
    """
    nodes = tree.tokens.shape[1]
    column = mx.arange(columns)
    node = column - start[:, None]  # [B, C]: the node whose row it is; negative: the text
    inside = mx.clip(node, 0, nodes - 1)
    index = mx.broadcast_to(inside[:, None], (*tree.tokens.shape, columns))
    above = mx.take_along_axis(tree.ancestors, index, axis=2)  # [B, N, C]
    mask = (node < 0)[:, None] | (above & ((node >= 0) & (node < nodes))[:, None])
    if window is None:
        return mask
    position = mx.where(node < 0, column, start[:, None] + mx.take_along_axis(tree.depths, inside, axis=1))
    own = start[:, None] + tree.depths  # [B, N]
    return mask & (own[..., None] - position[:, None] < window)
