"""An mlx-lm model seen as the target of speculative decoding.

The model's own code runs unmodified. It asks its cache for three things: ``offset`` (positions),
``make_mask`` and ``update_and_fetch``; ``TreeCache`` answers them for a tree of drafted nodes. Two
things the code does not offer are reached through a *view*, a copy of the modules that shares all
weights: the outputs of the inner model and of single layers (the hidden states) are recorded on their
way, and rotary embeddings, which take one offset per batch row only, get the nodes as batch rows.
A view does not see what is put into the model later, but ``parts`` tells that something was.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache

from ..decoding.layers import (
    Layers,
    Quantization,
    Rows,
    View,
    fit_rows,
    quantization_of,
    quantized_rows,
    visible,
    write_rows,
)
from ..decoding.step import Verified
from ..decoding.tree import Tree, make_tree
from .identity import token_embedding

ROPE_NAMES = ("rope", "rotary_emb")
RMS_EPS = 1e-6
INNER_NAMES = ("model", "transformer", "backbone")


class Target:
    """A language model that verifies trees.

    Args:
        model: an mlx-lm model with rotary attention and plain (or sliding-window) KV caches.
        layers: layers, counted from 1, whose outputs are part of the hidden states too, each divided by
            its root mean square. So F = H * (1 + len(layers)).

    Raises:
        ValueError: the model's state cannot be rolled back, or its parts cannot be found.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int] = ()) -> None:
        self.model = model
        self.windows = [_window(cache, model) for cache in make_prompt_cache(model)]
        self.layers_read = tuple(layers)
        self._watch(_view(model))
        self.vocabulary = int(self.embed.weight.shape[0])

    def with_weights(self, weights: list[mx.array]) -> "Target":
        """A twin that computes with other arrays in the places of its ``weights``."""
        twin = copy.copy(self)
        twin._watch(_view(self._view, iter(weights)))
        return twin

    def _watch(self, view: Any) -> None:
        self._view = view
        self.embed: Any = token_embedding(view)
        self.weights = [part for part in parts(view) if isinstance(part, mx.array)]
        self._lock = Lock()  # the recorders are shared
        inner = _Recorder.put_into(*_inner_place(view))
        layers = (_Recorder.put_into(*_layer_place(inner, layer)) for layer in self.layers_read)
        self._recorders = [inner, *layers]

    @property
    def layers(self) -> list[Any]:
        """The model's layers."""
        return _layers(self._recorders[0])

    def make_cache(self) -> list[KVCache]:
        """mlx-lm caches for prompt processing, one per layer, that keep every token."""
        return [KVCache() if window is None else _WindowedCache(window) for window in self.windows]

    def layers_of(self, caches: Sequence[KVCache]) -> tuple[int, Layers]:
        """How many tokens mlx-lm caches hold, and their buffers, with room for one row more at least."""
        rows = int(caches[0].offset)
        if rows == 0:  # they have no buffers yet
            caches = [copy.copy(cache) for cache in caches]
            self.forward(mx.array([[0]]), caches)
        layers = from_prompt_cache(caches)
        return rows, layers if rows < layers.capacity else fit_rows(layers, rows + 1)

    def no_context(self) -> mx.array:
        """[1, F]: what the drafter reads before anything is known."""
        hidden = self.embed(mx.array([[0]]))[:, 0]  # [1, H]
        return mx.tile(mx.zeros_like(hidden), (1, 1 + len(self.layers_read)))

    def forward(self, tokens: mx.array, caches: Sequence[Any]) -> tuple[mx.array, mx.array]:
        """Tokens [B, n] behind what ``caches`` hold -> logits [B, n, V] and hidden states [B, n, F]."""
        with self._lock:
            logits = self._view(tokens, cache=caches)
            last, *layers = [recorder.take() for recorder in self._recorders]
        states = [last, *(mx.fast.rms_norm(x, None, RMS_EPS).astype(last.dtype) for x in layers)]
        return logits, mx.concatenate(states, axis=-1) if layers else last

    def head(self, hidden: mx.array) -> mx.array:
        """Logits [B, n, V] for last hidden states [B, n, H]: the forward pass without the inner model."""
        with self._lock:
            self._recorders[0].play(hidden)
            logits: mx.array = self._view(mx.zeros(hidden.shape[:2], mx.int32))
        return logits

    def head_rows(self, ids: mx.array) -> mx.array:
        """Rows [n, H] of the head's matrix for tokens ``ids`` [n]; of the embedding if both are tied."""
        owner, _ = _inner_place(self.model)
        layer: Any = owner.get("lm_head", self.embed)
        if isinstance(layer, nn.QuantizedLinear):
            biases = None if layer.biases is None else layer.biases[ids]
            return mx.dequantize(
                layer.weight[ids], layer.scales[ids], biases, layer.group_size, layer.bits, layer.mode
            )
        rows: mx.array = layer(ids) if layer is self.embed else layer.weight[ids]
        return rows

    def verify(self, tree: Tree, layers: Layers, start: mx.array, view: View | None = None) -> Verified:
        """One forward pass over the tree's nodes, each at the position ``start`` + its depth."""
        masks: dict[int | None, mx.array] = {}
        view = view or View(layers.capacity)
        caches = [
            TreeCache(tree, start, view, masks, rows, window)
            for rows, window in zip(layers.rows, self.windows, strict=True)
        ]
        logits, hidden = self.forward(tree.tokens, caches)
        return Verified(logits, hidden, [cache.rows for cache in caches], [cache.nodes for cache in caches])

    def check_quantized(self, how: Quantization) -> None:
        """Raise ``ValueError`` if mlx-lm cannot decode with keys and values quantized so."""
        caches = self.make_cache()
        try:
            if any(self.windows):
                raise ValueError("it attends to a window only")
            for _ in range(2):  # nothing is computed
                self.forward(mx.array([[0]]), caches)
                quantize(caches, replace(how, start=0))
        except (ValueError, TypeError, AttributeError) as error:
            reason, *_ = str(error).partition("\n")
            raise ValueError(
                f"{_name(self.model)} cannot be decoded with keys and values of {how.bits} bits in groups of "
                f"{how.group_size} ({reason}): give others, or leave kv_bits out."
            ) from error

    def check(self) -> None:
        """Compare a branching tree's and a chain's logits with sequential decoding on this very model.

        Raises:
            ValueError: they differ, so drafting would change what the model says.
        """
        a, b, c, root, d, e, f, g, h = [(7919 * i + 13) % self.embed.weight.shape[0] for i in range(9)]
        #  root - d - e - f
        #          \ g - h
        parents = mx.array([[0, 0, 1, 2, 1, 4]], mx.int32)
        tree = make_tree(mx.array([[root, d, e, f, g, h]], mx.int32), parents, depth=3)
        chain = make_tree(mx.array([[root, d, e, f]], mx.int32), parents[:, :4], depth=3)
        chain.is_chain = True
        try:
            caches = self.make_cache()
            self.forward(mx.array([[a, b, c]]), caches)
            layers = from_prompt_cache(caches)
            found = mx.concatenate([self.verify(x, layers, mx.array([3])).logits[0] for x in (tree, chain)])
            first = self._sequential([a, b, c, root], [d, e, f])
            wanted = mx.stack([*first, *self._sequential([a, b, c, root], [d, g, h])[2:], *first])
            error = float(mx.abs(found.astype(mx.float32) - wanted).max())
            scale = float(mx.abs(wanted).max())
        except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as reason:
            raise ValueError(f"{_name(self.model)} cannot verify a draft tree: {reason}.") from reason
        tolerance = 1e-3 if found.dtype == mx.float32 else 0.1
        if not error <= tolerance * max(scale, 1.0):
            raise ValueError(
                f"{_name(self.model)} cannot verify a draft tree: its logits differ by {error:.2g} "
                f"(of {scale:.2g}) from sequential decoding."
            )

    def _sequential(self, prompt: list[int], chain: list[int]) -> list[mx.array]:
        """Logits [V] after the prompt and after each token of the chain, by plain decoding."""
        caches = make_prompt_cache(self.model)
        logits = [self.model(mx.array([tokens]), cache=caches) for tokens in (prompt, *([t] for t in chain))]
        return [x[0, -1].astype(mx.float32) for x in logits]


def from_prompt_cache(caches: Sequence[Any]) -> Layers:
    """The buffers of mlx-lm caches after prompt processing."""
    return Layers([[*x.keys, *x.values] if kept_as(x) is not None else [x.keys, x.values] for x in caches])


def to_prompt_cache(layers: Layers, rows: int, caches: list[Any], how: Quantization | None = None) -> None:
    """Give mlx-lm caches the committed buffers of one text, ``rows`` of which are valid.

    If these have been quantized since, by ``how``, quantized caches take the places of the given ones.
    """
    if len(layers.rows[0]) > 2:
        quantize(caches, how and replace(how, start=0))
    for parts, cache in zip(layers.rows, caches, strict=True):
        cache.keys, cache.values = parts if len(parts) == 2 else (parts[:3], parts[3:])
        cache.offset = rows


def kept_as(cache: Any) -> Quantization | None:
    """How what an mlx-lm cache holds is quantized; None: it is not."""
    return Quantization(cache.bits, cache.group_size) if isinstance(cache, QuantizedKVCache) else None


def quantize(caches: list[Any], how: Quantization | None) -> None:
    """Put quantized caches in the places of mlx-lm caches that hold ``how.start`` tokens or more."""
    if how is not None:
        maybe_quantize_kv_cache(caches, how.start, how.group_size, how.bits)


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
        view: View,
        masks: dict[int | None, mx.array],
        rows: Rows,
        window: int | None,
    ) -> None:
        self.tree, self.start, self.window = tree, start, window
        self.view = view
        self.masks = masks  # by window, shared by all layers
        self.rows, self.nodes = rows, [mx.array(0)] * len(rows)
        # positions: [B] of the root, from which a chain counts up, else [B, N] of each node
        self.offset = start if tree.is_chain else start[:, None] + tree.depths

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | None:
        window = window_size or self.window
        if n == 1 and self.view.exact and window is None and self.start.size == 1:
            return None
        if window not in self.masks:
            mask = visible(self.tree, self.start, self.view.columns, window)  # [B, N, C]
            self.masks[window] = mask[0] if mask.shape[0] == 1 else mask[:, None]
        return self.masks[window]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        self.nodes = [keys, values]
        if len(self.rows) > 2:
            how = quantization_of(self.rows[0], self.rows[1], keys.shape[-1])
            self.bits, self.group_size = how.bits, how.group_size
            self.nodes = [*quantized_rows(keys, how), *quantized_rows(values, how)]
        pairs = zip(self.rows, self.nodes, strict=True)
        self.rows = [write_rows(buffer, rows, self.start) for buffer, rows in pairs]
        shown = [buffer[:, :, : self.view.columns] for buffer in self.rows]
        return (shown[0], shown[1]) if len(shown) == 2 else (tuple(shown[:3]), tuple(shown[3:]))


class _WindowedCache(KVCache):  # type: ignore[misc]
    """Keeps every token, but shows only the last ``window`` to each, as a rotating cache would."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return super().make_mask(n, return_array=return_array, window_size=window_size or self.window)


class _NodeRope:
    """A rotary embedding that also takes one position per node: offset [B, N] for x [B, Hq or Hkv, N, Dh]."""

    def __init__(self, inner: Callable[..., mx.array]) -> None:
        self.inner = inner

    def __call__(self, x: mx.array, offset: int | mx.array = 0, **kwargs: Any) -> mx.array:
        if not isinstance(offset, mx.array) or offset.ndim < 2:
            rotated: mx.array = self.inner(x, offset=offset, **kwargs)
            return rotated
        batch, heads, nodes, size = x.shape
        x = x.transpose(0, 2, 1, 3).reshape(batch * nodes, heads, 1, size)
        x = self.inner(x, offset=offset.reshape(-1), **kwargs)
        return x.reshape(batch, nodes, heads, size).transpose(0, 2, 1, 3)  # [B, Hq or Hkv, N, Dh]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _Recorder:
    """Stands for a part of a view and keeps its last output, the hidden states."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self._output: Any = None
        self._instead: mx.array | None = None

    @classmethod
    def put_into(cls, owner: Any, name: Any) -> "_Recorder":
        owner[name] = recorder = cls(owner[name])
        return recorder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._instead is not None:
            output, self._instead = self._instead, None
            return output
        self._output = self.inner(*args, **kwargs)
        return self._output

    def take(self) -> mx.array:
        output, self._output = self._output, None
        if not isinstance(output, mx.array) or output.ndim != 3:
            raise ValueError("its hidden states cannot be read")
        return output

    def play(self, output: mx.array) -> None:
        """Give ``output`` at the next call instead of running."""
        self._instead = output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def parts(module: Any) -> list[Any]:
    """All that decides what a module computes: it is as it was if each part is the same object as before."""
    if isinstance(module, list | tuple):
        return [part for item in module for part in parts(item)]
    if not isinstance(module, dict):
        return [module]
    own = vars(module).values() if isinstance(module, nn.Module) else ()
    return [module, *own, *module, *(part for item in module.values() for part in parts(item))]


def _view(module: Any, weights: Iterator[mx.array] | None = None) -> Any:
    """A twin of ``module``, with its own arrays or these ``weights``, whose rotary embeddings take nodes."""
    if isinstance(module, mx.array):
        return module if weights is None else next(weights)
    if isinstance(module, _Recorder):
        return _view(module.inner, weights)
    if isinstance(module, list | tuple):
        return type(module)(_view(item, weights) for item in module)
    if not isinstance(module, dict):
        return module
    twin = copy.copy(module)
    for name, child in module.items():
        wrapped = name in ROPE_NAMES and callable(child) and not isinstance(child, _NodeRope)
        twin[name] = _NodeRope(child) if wrapped else _view(child, weights)
    return twin


def _inner_place(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that owns the inner model (whose output the head reads), and its name there."""
    owner = model.get("language_model", model)
    for name in INNER_NAMES:
        if isinstance(owner.get(name), nn.Module):
            return owner, name
    raise ValueError(f"{_name(model)} has no inner model named {' or '.join(INNER_NAMES)}.")


def _layer_place(inner: _Recorder, layer: int) -> tuple[list[Any], int]:
    """The list of an inner model's layers, and the place there of a layer counted from 1."""
    layers = _layers(inner)
    if not 1 <= layer <= len(layers):
        raise ValueError(f"layer {layer} is not usable as context: the model has {len(layers)} layers.")
    return layers, layer - 1


def _layers(inner: _Recorder) -> list[Any]:
    layers = inner.inner.get("layers", inner.inner.get("h"))
    return layers if isinstance(layers, list) else []


def _window(cache: Any, model: nn.Module) -> int | None:
    """The attention window behind an mlx-lm cache; None where it keeps everything."""
    if type(cache) is KVCache:
        return None
    if type(cache) is RotatingKVCache and cache.keep == 0:
        return int(cache.max_size)
    raise ValueError(
        f"{_name(model)} cannot be decoded with a drafter: its {type(cache).__name__} cannot be rolled "
        "back after a rejected draft: load it without one, as with --drafter none."
    )


def _name(model: nn.Module) -> str:
    return f"Model type {getattr(model, 'model_type', type(model).__name__)}"
