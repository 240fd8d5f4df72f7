"""An mlx-lm model seen as the target of speculative decoding.

The model's own code runs unmodified. Attention asks its cache for three things: ``offset`` (positions),
``make_mask`` and ``update_and_fetch``; ``TreeCache`` answers them for a tree of drafted nodes. Recurrent
layers are given their states. What else must be known is watched in a *view* of the model (``hooks.py``; for
recurrent layers ``recurrent.py``).
"""

import contextlib
import copy
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import (
    ArraysCache,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from ..decoding.layers import (
    Layers,
    Places,
    Quantization,
    Rows,
    View,
    as_ring,
    fit_rows,
    visible,
    write_rows,
)
from ..decoding.step import Verified
from ..decoding.tree import Tree
from ..loading.cache import read_note, write_note
from .hooks import ERRORS, Recorder, States, Tape, leaves, parts, view, with_each
from .identity import token_embedding
from .tried import conditions

if TYPE_CHECKING:
    from .memory import MemoryDrafter

RMS_EPS = 1e-6
X86 = ("x86_64", "amd64")
INNER_NAMES = ("model", "transformer", "backbone")
LAYERS_NAMES = ("layers", "h", "blocks")
NORM_NAMES = ("norm", "final_layer_norm")


class Target:
    """A language model that verifies trees, or chains only.

    Args:
        model: an mlx-lm model whose caches are plain or sliding-window KV caches, states of recurrent
            layers, or lists of these.
        layers: layers, counted from 1, whose outputs are part of the hidden states too, each divided by
            its root mean square. So F = H * (1 + len(layers)).
        memory: the drafter that is told of every token that is read.

    Attributes:
        has_states: whether it has recurrent layers.
        is_part: whether other machines have other layers of it.
        trees: whether it verifies trees that branch; found by ``check``.
        batches: whether it verifies several texts at once; found by ``check``.

    Raises:
        ValueError: the model's state cannot be rolled back, or its parts cannot be found.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[int] = (), memory: "MemoryDrafter | None" = None
    ) -> None:
        self.model, self.memory = model, memory
        self._caches = make_prompt_cache(model)  # empty
        kept = list(leaves(self._caches))
        self.windows = [_window(cache, model) for cache in kept if type(cache) is not ArraysCache]
        self.has_states = len(kept) > len(self.windows)
        if self.memory is not None:
            self.windows.append(self.memory.config.memory_window)
        self.trees = self.batches = True
        self.leader: Any = None  # where several machines verify (``engine/ranks.py``)
        self.layers_read = tuple(layers)
        self._has_inner_head, self._full = False, list[list[mx.array]]()
        self._watch(model)
        self.vocabulary = int(self.embed.weight.shape[0])
        with contextlib.suppress(*ERRORS):  # ``check`` will tell
            caches = self.make_cache()
            logits, hidden, _ = self._forward(mx.zeros((1, 16), mx.int32), caches)  # nothing is computed
            self._full = from_prompt_cache(caches).states
            wanted = self.no_context().shape[-1]
            if hidden.shape[-1] - wanted == logits.shape[-1] - wanted // (1 + len(layers)) != 0:  # V - H
                self._has_inner_head = True  # what the inner model gives are logits
                self._watch(model)

    def with_weights(self, weights: list[mx.array]) -> "Target":
        """A twin that computes with other arrays in the places of its ``weights``."""
        twin = copy.copy(self)
        twin._watch(self.model, iter(weights))  # its view may keep more by now
        return twin

    def _watch(self, model: Any, weights: Iterator[mx.array] | None = None) -> None:
        self._lock = Lock()  # the recorders and the tape are shared
        self.tape: Any = Tape()
        if is_watched := any(type(x) in (ArraysCache, ChunkedKVCache) for x in leaves(self._caches)):
            from .recurrent import Notes, watch

            self.tape = Notes()
        self._view = view(model, self.tape, weights)
        self.embed: Any = token_embedding(self._view)
        self.weights = [part for part in parts(self._view) if isinstance(part, mx.array)]
        if is_watched:
            watch(self._view, self.tape)
        if platform.machine().lower() in X86 and mx.default_device().type != mx.gpu:
            from .x86 import quicken

            quicken(self._view, self.tape)
        inner: Any = _inner_place(self._view)
        self.is_part = getattr(inner[0][inner[1]], "pipeline_size", 1) > 1
        self.layers = _layers(inner[0][inner[1]])
        read = [_layer_recorder(self.layers, layer) for layer in self.layers_read]
        if self._has_inner_head:
            inner = _norm_place(inner[0][inner[1]])
        self._recorders: list[Any] = [Recorder.put_into(*inner), *read]

    def make_cache(self) -> list[Any]:
        """mlx-lm caches for prompt processing, one per layer."""
        windows = iter(self.windows)

        def empty(cache: Any) -> Any:
            if isinstance(cache, ArraysCache):
                return _StatesCache(len(cache.cache))
            window = next(windows)
            if isinstance(cache, ChunkedKVCache):
                return _ChunksCache()
            return KVCache() if window is None else RotatingKVCache(window)

        return with_each(self._caches, empty)

    def make_memory(self, caches: Sequence[Any]) -> list[Any]:
        """The cache of the drafter's memory, if it has one: the last that ``forward`` takes."""
        held = max(int(getattr(cache, "offset", 0)) for cache in leaves(caches))
        return [] if self.memory is None else [self.memory.make_cache(held)]

    def suits(self, caches: Sequence[Any]) -> bool:
        """Whether mlx-lm caches keep the rows that the model needs, and in places that are known."""
        turning = [cache for cache in leaves(caches) if isinstance(cache, RotatingKVCache)]
        needed = self.windows if self.memory is None else self.windows[:-1]
        return windows_of(caches) == needed and not any(cache.keep for cache in turning)

    def layers_of(self, caches: Sequence[Any]) -> tuple[int, Layers]:
        """How many tokens mlx-lm caches hold, and what they hold, with room for one row more at least.

        Raises:
            ValueError: there are states only, of mlx-lm's own, which do not say how many tokens led to them.
        """
        if len(caches) == len(self._caches):
            caches = [*caches, *self.make_memory(caches)]
        rows = max(int(getattr(cache, "offset", 0)) for cache in leaves(caches))
        if rows == 0 and not all(cache.empty() for cache in leaves(caches)):
            raise ValueError("a cache that does not say how many tokens it holds: leave it out.")
        if rows == 0:  # they have no buffers yet, and states that come from nothing
            caches = copy.deepcopy(list(caches))
            self.forward(mx.array([[0]]), caches)
        layers = from_prompt_cache(caches)
        layers.memory = self.memory is not None
        layers.states = [
            [_padded(state, full) for state, full in zip(*pair, strict=True)]
            for pair in zip(layers.states, self._full, strict=True)
        ]
        if rows == 0:  # what the machines would have to compute together, all at the same time, is not
            layers.rows, layers.states = tree_map(mx.zeros_like, (layers.rows, layers.states))
        short = 0 < layers.capacity <= rows
        return rows, fit_rows(layers, max(layers.capacity, rows + 1)) if short or layers.memory else layers

    def no_context(self) -> mx.array:
        """[1, F]: what the drafter reads before anything is known."""
        hidden = self.embed(mx.array([[0]]))[:, 0]  # [1, H]
        return mx.tile(mx.zeros_like(hidden), (1, 1 + len(self.layers_read)))

    def forward(self, tokens: mx.array, caches: Sequence[Any]) -> tuple[mx.array, mx.array]:
        """Tokens [B, n] after what ``caches`` hold -> logits [B, n, V] and hidden states [B, n, F]."""
        own = caches[: len(self._caches)]
        logits, hidden, _ = self._forward(tokens, own)
        if self.memory is not None and len(caches) > len(own):
            caches[-1].update_and_fetch(*self.memory.remember(hidden, self.embed(tokens)))
        for cache in leaves(own):
            if isinstance(cache, _StatesCache):
                cache.offset += tokens.shape[1]
        return logits, hidden

    def _forward(
        self,
        tokens: mx.array,
        caches: Sequence[Any],
        watched: Sequence[Any] = (),
        tree: Tree | None = None,
        offset: mx.array | None = None,
        columns: int = 0,
    ) -> tuple[mx.array, mx.array, Callable[[mx.array], States]]:
        with self._lock:
            self.tape.start(tokens, tree if watched else None, offset, columns)
            logits = self._view(tokens, cache=caches)
            last, *layers = [recorder and recorder.take() for recorder in self._recorders]
            after = self.tape.stop(watched)
        if layers and self.is_part:
            from .divided import from_all

            logits, layers = from_all(logits, last, layers)
        states = [last, *(mx.fast.rms_norm(x, None, RMS_EPS).astype(last.dtype) for x in layers)]
        return logits, mx.concatenate(states, axis=-1) if layers else last, after

    def head(self, hidden: mx.array) -> mx.array:
        """Logits [B, n, V] for last hidden states [B, n, H]: the forward pass without the inner model."""
        with self._lock:
            self._recorders[0].play(hidden)
            logits: mx.array = self._view(mx.zeros(hidden.shape[:2], mx.int32))
        return logits

    def verify(self, tree: Tree, layers: Layers, start: mx.array, view: View | None = None) -> Verified:
        """One forward pass over the tree's nodes, each at the position ``start`` + its depth."""
        masks: dict[tuple[int | None, int], mx.array] = {}
        places: Places = {}
        shown = view or View(max((int(parts[0].shape[2]) for parts in layers.rows), default=0))
        kept, states = zip(layers.rows, layers.windows, strict=True), iter(layers.states)
        trees: list[TreeCache] = []
        watched: list[Any] = []

        def stand_in(cache: Any) -> Any:
            if isinstance(cache, ArraysCache):
                watched.append(self.tape.seen(next(states)))
                return watched[-1]
            trees.append(TreeCache(tree, start, offset, shown, masks, places, *next(kept)))
            return trees[-1]

        # Of a chain's root [B], from which it counts up; of each of a tree's nodes [B, N].
        offset = start if tree.is_chain else start[:, None] + tree.depths
        caches = with_each(self._caches, stand_in)
        logits, hidden, after = self._forward(tree.tokens, caches, watched, tree, offset, shown.columns)
        rows, nodes = [x.rows for x in trees], [x.nodes for x in trees]
        if self.memory is not None:
            rows.append(layers.rows[-1])
            nodes.append(self.memory.remember(hidden, self.embed(tree.tokens)))
        return Verified(logits, hidden, rows, nodes, after)

    def check(self, device: str = "", agree: Callable[[str], str] = str) -> None:
        """Compare logits with sequential decoding's on this very model (``trial.py``).

        If only those of trees, or of several texts at once, differ, ``trees`` or ``batches`` becomes false.

        Args:
            device: on which, by name; what is found is kept in the cache folder then, and taken from there.
            agree: given why something failed here, or "", says why it did on any of the machines.

        Raises:
            ValueError: a chain's differ, so drafting would change what the model says.
        """
        known = conditions(self, device) if device else {}
        note = read_note("self-checks", known) if known else {}
        is_known = all(isinstance(note.get(name), bool) for name in ("trees", "batches"))
        if not agree("" if is_known else "it is not known"):
            self.trees, self.batches = self.trees and note["trees"], note["batches"]
            return
        from .trial import try_out

        try_out(self, name_of(self.model), agree)
        if known:
            write_note("self-checks", known, trees=self.trees, batches=self.batches)


def read_rows(caches: Sequence[Any]) -> Layers:
    """What mlx-lm caches hold, in order (``in_order``), and copies of the lists of states."""
    kept: list[Any] = list(leaves(caches))
    with_rows = [cache for cache in kept if not isinstance(cache, ArraysCache)]
    some: Any = next((cache for cache in with_rows if isinstance(cache.keys, mx.array)), None)
    rows: list[Rows] = []
    for cache in with_rows:
        holds = cache if cache.keys is not None else some  # what is never written to has no width
        found: Rows = []
        if isinstance(holds, RotatingKVCache):
            found = [holds._temporal_order(part) for part in (holds.keys, holds.values)]
        else:
            quantized = kept_as(holds) is not None
            found = [*holds.keys, *holds.values] if quantized else [holds.keys, holds.values]
        rows.append(found if holds is cache else [part[..., :0] for part in found])
    states = [list[Any](cache.cache) for cache in kept if isinstance(cache, ArraysCache)]
    return Layers(rows, states=states, windows=windows_of(caches))


def windows_of(caches: Sequence[Any]) -> list[int | None]:
    """The last rows that each of mlx-lm's caches of rows keeps; None: all."""
    kept = [cache for cache in leaves(caches) if not isinstance(cache, ArraysCache)]
    return [cache.max_size if isinstance(cache, RotatingKVCache) else None for cache in kept]


def from_prompt_cache(caches: Sequence[Any]) -> Layers:
    """What mlx-lm caches hold after prompt processing, as buffers."""
    layers = read_rows(caches)
    count = max((int(getattr(cache, "offset", 0)) for cache in leaves(caches)), default=0)
    pairs = list(zip(layers.rows, layers.windows, strict=True))
    capacity = min((int(rows[0].shape[2]) for rows, window in pairs if window is None), default=count + 1)
    for number, (rows, window) in enumerate(pairs):
        if window is not None:
            layers.rows[number] = [as_ring(part, count, layers.size(number, capacity)) for part in rows]
    return layers


def _padded(state: mx.array, full: mx.array) -> mx.array:
    """A state of the last token ids, with zeros before them in a short text; others are as they are."""
    missing = full.shape[1] - state.shape[1] if mx.issubdtype(state.dtype, mx.integer) else 0
    return mx.pad(state, [(0, 0), (missing, 0)]) if missing else state


def kept_as(cache: Any) -> Quantization | None:
    """How what an mlx-lm cache holds is quantized; None: it is not."""
    return Quantization(cache.bits, cache.group_size) if isinstance(cache, QuantizedKVCache) else None


class TreeCache:
    """What one attention layer sees of its memory while a tree of N nodes is verified.

    After the layer ran, ``rows`` [B, Hkv, C, ...] (keys and values, or three parts of each) hold the nodes'
    rows at ``start`` and after, and ``nodes`` [B, Hkv, N, ...] are these alone. If they are quantized,
    mlx-lm's attention finds ``bits`` and ``group_size``.
    """

    def __init__(
        self,
        tree: Tree,
        start: mx.array,
        offset: mx.array,
        view: View,
        masks: dict[tuple[int | None, int], mx.array],
        places: Places,
        rows: Rows,
        window: int | None,
    ) -> None:
        self.tree, self.start, self.window = tree, start, window
        self.view, self.columns = view, min(view.columns, int(rows[0].shape[2]))
        self.masks, self.places = masks, places  # by window and columns, shared by all layers
        nodes = tree.tokens.shape[1]
        self.rows, self.nodes = rows, [part[:, :, :nodes] for part in rows]  # if it never writes any
        self.offset = offset

    start_position = 0  # that, and what follows, is asked of a cache of chunks

    def maybe_trim_front(self) -> None:
        """Earlier chunks stay, hidden by the model's own mask."""

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | None:
        window = min((each for each in (window_size, self.window) if each), default=None)
        everything = self.view.exact and self.view.columns <= (window or sys.maxsize)
        if n == 1 and everything and self.start.size == 1:
            return None
        if (window, self.columns) not in self.masks:
            mask = visible(self.tree, self.start, self.columns, window)  # [B, N, C]
            self.masks[window, self.columns] = mask[:, None]
        return self.masks[window, self.columns]

    keys = property(lambda self: self.rows[0], lambda self, rows: self._put(0, rows))  # some models
    values = property(lambda self: self.rows[1], lambda self, rows: self._put(1, rows))  # depend on them

    def _put(self, part: int, rows: mx.array) -> None:
        self.rows[part] = rows

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        if values.shape[-1] == 0:  # an index over the places of rows, which are not those of mlx-lm's cache
            raise ValueError("it selects rows by their places in its cache")
        self.nodes = [keys, values]
        if len(self.rows) > 2:
            from ..decoding.quantized import quantization_of, quantized_rows

            how = quantization_of(self.rows[0], self.rows[1], keys.shape[-1])
            self.bits, self.group_size = how.bits, how.group_size
            self.nodes = [*quantized_rows(keys, how), *quantized_rows(values, how)]
        pairs = zip(self.rows, self.nodes, strict=True)
        self.rows = [write_rows(buffer, rows, self.start, self.window, self.places) for buffer, rows in pairs]
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        """What attention is shown, as after ``update_and_fetch``."""
        shown = [buffer[:, :, : self.columns] for buffer in self.rows]
        return (shown[0], shown[1]) if len(shown) == 2 else (tuple(shown[:3]), tuple(shown[3:]))


class _StatesCache(ArraysCache):  # type: ignore[misc]
    """Counts its tokens; ``Target.forward`` does."""

    offset = 0


class _ChunksCache(KVCache):  # type: ignore[misc]
    """Keeps every token."""

    start_position, maybe_trim_front = TreeCache.start_position, TreeCache.maybe_trim_front


def _inner_place(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that owns the inner model (whose output the head reads), and its name there."""
    owner = model.get("language_model", model)
    for name in INNER_NAMES:
        if isinstance(owner.get(name), nn.Module):
            return (owner, name) if callable(owner[name]) else (owner[name], "language_model")
    raise ValueError(f"{name_of(model)} has no inner model named {' or '.join(INNER_NAMES)}.")


def _norm_place(inner: Any) -> tuple[nn.Module, str]:
    """Where the final norm is, whose output the head reads, in an inner model that gives logits."""
    while inner is not None:
        for name in NORM_NAMES:
            if name in inner:
                return inner, name
        inner = _nested(inner)
    raise ValueError(f"its hidden states cannot be read: there is no {' or '.join(NORM_NAMES)}")


def _nested(module: nn.Module) -> Any:
    return next((module[name] for name in ("language_model", *INNER_NAMES) if name in module), None)


def _layer_recorder(layers: list[Any], layer: int) -> Recorder | None:
    """In the place of an inner model's layer, counted from 1; None if another machine has it."""
    if not 1 <= layer <= len(layers):
        raise ValueError(f"layer {layer} is not usable as context: the model has {len(layers)} layers.")
    return layers[layer - 1] and Recorder.put_into(layers, layer - 1)


def _layers(inner: Any) -> list[Any]:
    while isinstance(inner, nn.Module):
        inner = next((inner[name] for name in LAYERS_NAMES if name in inner), _nested(inner))
    return inner if isinstance(inner, list) else []


def _window(cache: Any, model: nn.Module) -> int | None:
    """The attention window behind an mlx-lm cache; None where it keeps everything."""
    if type(cache) in (KVCache, ChunkedKVCache):
        return None
    if type(cache) is RotatingKVCache and cache.keep == 0:
        return int(cache.max_size)
    raise ValueError(
        f"{name_of(model)} cannot verify drafts: its {type(cache).__name__} cannot be rolled back after a "
        "rejected one."
    )


def name_of(model: nn.Module) -> str:
    """What errors call a model."""
    return f"Model type {getattr(model, 'model_type', type(model).__name__)}"
