"""What the target's layers remember of B texts.

Attention keeps rows, in fixed buffers whose length lives on the device. Writing to a buffer is in place only
while nothing else reads it, and attention reads the buffers in every step. So a step does not move the
accepted nodes' rows itself: it leaves them in ``path``, and the next step's first act is to ``commit`` them.

A layer that attends to a window needs no rows before it. So its buffer stops growing at ``window + room``
rows and goes round, as a ring: the row of place p is at p % size. That is so of every buffer, and where all
rows are needed none ever goes round. The room is for the nodes of two steps: those of one that is not
accepted, or given up, take the places of rows that nobody needs any more.

A drafter's memory of the text is one more layer of rows, the last. Nothing reads its nodes' rows while they
are verified, so they are only ever written by ``commit``, also where the nodes are a chain.

Recurrent layers keep states, whose size does not depend on the text. Nothing is written into these: a step
replaces them with those after the accepted nodes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import mlx.core as mx

from .tree import Tree

# Of one layer, each [B, Hkv, C, ...]: keys and values; if quantized, three parts of each.
Rows = list[mx.array]
Places = dict[tuple[int, int], mx.array]  # [B, 1, n, 1], where n rows go in a buffer of that size

ROOM = 64  # rows of a ring besides its window, at first


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
    # L + 1 rows of each, or none; of a chain the memory's only.
    path: list[Rows] = field(default_factory=list)
    path_start: mx.array | None = None  # [B] where the path's rows belong
    states: list[list[mx.array]] = field(default_factory=list)  # of each recurrent layer, each [B, ...]
    windows: Sequence[int | None] = ()  # last rows that each layer needs; None: all. Empty: all need all
    room: int = ROOM  # rows of each ring besides its window
    memory: bool = False  # whether the last layer is the drafter's memory, which is never quantized

    def __post_init__(self) -> None:
        self.windows = self.windows or [None] * len(self.rows)

    @property
    def capacity(self) -> int:
        """C, rows of each text that the buffers have room for; 0 if they are rings, or none: no bound."""
        pairs = zip(self.rows, self.windows, strict=True)
        sizes = [(int(parts[0].shape[2]), window) for parts, window in pairs]
        return min((size for size, window in sizes if window is None or size < window + self.room), default=0)

    def nbytes_of(self, capacity: int) -> int:
        """Bytes that one text needs to have room for ``capacity`` rows."""
        states = sum(part.nbytes // part.shape[0] for parts in self.states for part in parts)
        return states + sum(
            part.nbytes // (part.shape[0] * part.shape[2]) * self.size(layer, capacity)
            for layer, parts in enumerate(self.rows)
            for part in parts
        )

    def size(self, layer: int, capacity: int) -> int:
        """Rows of a layer's buffers in which there is room for texts of ``capacity`` rows."""
        window = self.windows[layer]
        return capacity if window is None else min(capacity, window + self.room)

    def has_room(self, nodes: int) -> bool:
        """Whether the rings have room for the nodes of a step."""
        return 2 * nodes <= self.room or not any(self.windows)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers and the states."""
        return sum(part.nbytes for parts in (*self.rows, *self.states) for part in parts)


@dataclass(frozen=True)
class View:
    """What attention is shown of the buffers.

    Attributes:
        columns: the first rows, at least the text's and the nodes', or a whole ring.
        exact: all of them are the text's or the nodes', so that a single node needs no mask.
    """

    columns: int
    exact: bool = False


def commit(layers: Layers) -> Layers:
    """Write the last path's rows to their places; rows after the accepted ones are never read."""
    if layers.path_start is None:
        return layers
    start, known = layers.path_start, Places()
    written = [
        [write_rows(buffer, part, start, window, known) for buffer, part in zip(rows, path, strict=True)]
        if path
        else rows
        for rows, path, window in zip(layers.rows, layers.path, layers.windows, strict=True)
    ]
    return replace(layers, rows=written, path=[], path_start=None)


def leave_path(layers: Layers, nodes: Sequence[Rows], path: mx.array, start: mx.array) -> Layers:
    """The layers with their buffers as they are and the path's rows to be committed.

    Args:
        layers: the buffers hold the nodes' rows.
        nodes: per layer [B, Hkv, N, ...], rows of the verified nodes; none where they are in their places.
        path: [B, L+1], the accepted nodes.
        start: [B], where the root's row belongs.
    """
    index, length = path[:, None, :, None], path.shape[1]  # [B, 1, L+1, 1]
    shared = cache(lambda batch, heads, _, *more: mx.broadcast_to(index, (batch, heads, length, *more)))
    left = [[mx.take_along_axis(part, shared(*part.shape), axis=2) for part in rows] for rows in nodes]
    return replace(layers, path=left, path_start=start)


def write_rows(
    buffer: mx.array, rows: mx.array, start: mx.array, window: int | None = None, known: Places | None = None
) -> mx.array:
    """``buffer`` [B, Hkv, C, ...] with ``rows`` [B, Hkv, n, ...] at ``start`` [B] of each text, and round.

    Layers that write at the same ``start`` share what is ``known``.
    """
    rows, size, known = rows.astype(buffer.dtype), buffer.shape[2], {} if known is None else known
    if buffer.shape[0] == 1 and (window is None or rows.shape[2] == 1):
        return mx.slice_update(buffer, rows, start if window is None else start % size, axes=(2,))
    kind = rows.shape[2], size
    if kind not in known:
        known[kind] = ((start[:, None] + mx.arange(rows.shape[2])) % size)[:, None, :, None]
    return mx.put_along_axis(buffer, known[kind], rows, axis=2)


def write_tokens(history: mx.array, tokens: mx.array, start: mx.array) -> mx.array:
    """``history`` [B, C] with ``tokens`` [B, n] at ``start`` [B] of each text."""
    tokens = tokens.astype(history.dtype)
    if history.shape[0] == 1:
        return mx.slice_update(history, tokens, start, axes=(1,))
    return mx.put_along_axis(history, start[:, None] + mx.arange(tokens.shape[1]), tokens, axis=1)


def fit_rows(layers: Layers, capacity: int) -> Layers:
    """The committed layers with room for exactly ``capacity`` rows."""
    return _rebuilt(layers, capacity, lambda buffer, size: _fitted(buffer, size))


def take_rows(layers: Layers, texts: mx.array, capacity: int) -> Layers:
    """The committed layers of the ``texts`` [M], by number, with room for exactly ``capacity`` rows."""
    taken = _rebuilt(layers, capacity, lambda buffer, size: _fitted(buffer[:, :, :size][texts], size))
    return replace(taken, states=[[state[texts] for state in states] for states in layers.states])


def with_room(layers: Layers, capacity: int, room: int, rows: mx.array) -> Layers:
    """The committed layers of texts of ``rows`` [B] with another room in rings, in place of the given."""
    layers = replace(commit(layers), room=room)
    for number, parts in enumerate(layers.rows):
        if layers.windows[number] is not None:
            old, new = parts[0].shape[2], layers.size(number, capacity)
            place = places(rows, new) % old  # [B, new]
            layers.rows[number] = [mx.take_along_axis(x, place[:, None, :, None], axis=2) for x in parts]
            mx.eval(layers.rows[number])
    return layers


def in_order(layers: Layers, rows: int, nodes: int | None = None) -> Layers:
    """The committed layers of a text of ``rows`` tokens, with rings unrolled: its last rows, in order.

    These are all of them or, after the ring went round, at least those of the window.

    Args:
        nodes: the most that a step of the text had, if it is known; so more rows are.
    """
    found, spoilt = [], layers.room if nodes is None else 2 * nodes
    for parts, window in zip(layers.rows, layers.windows, strict=True):
        size = int(parts[0].shape[2])
        is_ring = window is not None and size == window + layers.room
        first = max(rows + spoilt - size, 0) if is_ring else 0
        start, end = first % size, first % size + rows - first
        if window is None:
            found.append([*parts])
        elif end <= size:
            found.append([part[:, :, start:end] for part in parts])
        else:
            around = [[part[:, :, start:], part[:, :, : end - size]] for part in parts]
            found.append([mx.concatenate(both, axis=2) for both in around])
    return replace(layers, rows=found)


def as_ring(rows: mx.array, count: int, size: int) -> mx.array:
    """The last rows [B, Hkv, n, ...] of texts of ``count``, in order, as a buffer of ``size`` has them."""
    rows = rows[:, :, -size:]
    start, held = (count - rows.shape[2]) % size, rows.shape[2]
    over = max(start + held - size, 0)  # rows that go round
    around = [(0, 0), (0, 0), (start - over, size - start - held + over), (0, 0)]
    return mx.roll(mx.pad(rows, around), over, 2) if over else mx.pad(rows, around)


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
    return replace(parts[0], rows=joined, states=states)


def one_text(layers: Layers, number: int) -> Layers:
    """The committed layers of one text."""
    rows, states = (
        [[x if x.shape[0] == 1 else x[number : number + 1] for x in parts] for parts in all_parts]
        for all_parts in (layers.rows, layers.states)
    )
    return replace(layers, rows=rows, states=states)


def _rebuilt(layers: Layers, capacity: int, change: Callable[[mx.array, int], mx.array]) -> Layers:
    """The committed layers with every buffer changed, given the rows it is to have; one at a time and in the
    same lists, so that no two copies of all are in memory at once."""
    for number, rows in enumerate(layers.rows):
        for part in range(len(rows)):
            if layers.path_start is not None and layers.path[number]:
                path = layers.path[number][part]
                rows[part] = write_rows(rows[part], path, layers.path_start, layers.windows[number])
            rows[part] = change(rows[part], layers.size(number, capacity))
            mx.eval(rows[part])
    return replace(layers, path=[], path_start=None)


def _fitted(buffer: mx.array, capacity: int) -> mx.array:
    missing = capacity - buffer.shape[2]
    if missing <= 0:
        return mx.contiguous(buffer[:, :, :capacity]) if missing < 0 else buffer
    return mx.pad(buffer, [(0, 0), (0, 0), (0, missing), (0, 0)])


def places(start: mx.array, size: int) -> mx.array:
    """The place before ``start`` [B] whose row each row of a buffer is: [B, size]; negative: none."""
    row = mx.arange(size)
    return start[:, None] - size + (row - start[:, None]) % size


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
    nodes, start = tree.tokens.shape[1], start[:, None]
    before = places(start[:, 0], columns)  # [B, C]: the place in the text whose row it is
    node = before - start + columns  # [B, C]: the node whose row it is instead
    is_node, inside = node < nodes, mx.minimum(node, nodes - 1)
    index = mx.broadcast_to(inside[:, None], (*tree.tokens.shape, columns))
    above = mx.take_along_axis(tree.ancestors, index, axis=2)  # [B, N, C]
    mask = mx.where(is_node[:, None], above, (before >= 0)[:, None])
    if window is None:
        return mask
    position = mx.where(is_node, start + mx.take_along_axis(tree.depths, inside, axis=1), before)
    own = start + tree.depths  # [B, N]
    return mask & (own[..., None] - position[:, None] < window)
