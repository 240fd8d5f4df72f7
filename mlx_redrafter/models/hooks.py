"""How an unmodified mlx-lm model is watched: in a *view*, a copy of its modules that shares all weights.

- Outputs of the inner model and of single layers (hidden states) are recorded on their way (``Recorder``).
- Rotary embeddings take one offset per batch row only; they get a tree's nodes as batch rows (``NodeRope``).
- Recurrent layers keep only their state after the last token: ``recurrent.py`` finds earlier ones.

A view does not see what is put into the model later, but ``parts`` tells that something was.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import CacheList

from ..decoding.tree import Tree

ROPE_NAMES = ("rope", "rotary_emb")
ERRORS = (ValueError, TypeError, AttributeError, LookupError, RuntimeError)  # of code that does not fit

States = list[list[mx.array]]  # of each recurrent layer, arrays [B, ...]


class Tape:
    """What the parts of a view know while N nodes are verified."""

    def __init__(self) -> None:
        self.offset: mx.array | None = None  # positions while nodes are verified
        self.turns: dict[Any, tuple[mx.array, mx.array]] = {}  # of rotary embeddings, in this pass
        self.masks: dict[Any, tuple[Any, mx.array]] = {}  # in this pass, and what is made of each

    def start(self, tokens: mx.array, tree: Tree | None, offset: mx.array | None, columns: int) -> None:
        """From now on tokens are read, or nodes verified.

        Args:
            tokens: [B, N], the nodes'.
            tree: that recurrent layers verify.
            offset: the nodes' positions; None: tokens are read.
            columns: rows of the buffers that attention is shown.
        """
        self.offset, self.turns, self.masks = offset, {}, {}

    def stop(self, caches: Sequence[Any]) -> Callable[[mx.array], States]:
        """The states after a node [B] of each text."""
        self.offset, self.turns, self.masks = None, {}, {}
        return lambda last: []


class StandIn:
    """Takes the place of a part of a view, and has all its attributes."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class NodeRope(StandIn):
    """A rotary embedding that also takes one position per node: offset [B, N] for x [B, Hq or Hkv, N, Dh].

    While nodes are verified, a number as the offset comes from the buffers' shape, which says nothing.

    MLX has no kernel for it on a CPU: 28 operations, most of which find the sines of the same angles in each
    layer. There layers whose embeddings ``turn`` alike share them, and each has 8 operations.
    """

    def __init__(self, inner: Any, tape: Tape) -> None:
        super().__init__(inner)
        self.tape, self.size = tape, getattr(inner, "dims", 0)
        self.kind = None if mx.default_device().type == mx.gpu else _kind(inner, self.size)

    def __call__(self, x: mx.array, offset: int | mx.array = 0, **kwargs: Any) -> mx.array:
        if isinstance(offset, int) and offset and self.tape.offset is not None:
            offset = self.tape.offset
        is_shared = isinstance(offset, int) or offset is self.tape.offset
        fits = self.kind is not None and x.dtype == mx.float32 and x.shape[-1] == self.size
        if not (is_shared and fits) or kwargs:
            return self._rotated(x, offset, **kwargs)
        which, known = (self.kind, *x.shape, offset if isinstance(offset, int) else None), self.tape.turns
        if which not in known:
            known[which] = turns(lambda x: self._rotated(x, offset), x.shape)
        return turn(x, *known[which])

    def _rotated(self, x: mx.array, offset: int | mx.array, **kwargs: Any) -> mx.array:
        if not isinstance(offset, mx.array) or offset.ndim < 2:
            rotated: mx.array = self.inner(x, offset=offset, **kwargs)
            return rotated
        batch, heads, nodes, size = x.shape
        x = x.transpose(0, 2, 1, 3).reshape(batch * nodes, heads, 1, size)
        x = self.inner(x, offset=offset.reshape(-1), **kwargs)
        return x.reshape(batch, nodes, heads, size).transpose(0, 2, 1, 3)  # [B, Hq or Hkv, N, Dh]


def turns(rotate: Callable[[mx.array], mx.array], shape: Sequence[int]) -> tuple[mx.array, mx.array]:
    """Cosines and sines [B, Hq or Hkv, N, Dh] for ``turn``, of a rotary embedding of x of that shape."""
    half = shape[-1] // 2
    ones = mx.broadcast_to(mx.arange(shape[-1]) < half, (shape[0], 1, *shape[2:])).astype(mx.float32)
    cosines, sines = mx.split(rotate(ones), [half], axis=-1)
    cosines = mx.concatenate([cosines, cosines], axis=-1)
    sines = mx.concatenate([-sines, sines], axis=-1)
    return mx.broadcast_to(cosines, shape), mx.broadcast_to(sines, shape)


def turn(x: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
    """``x`` [B, Hq or Hkv, N, Dh], each of its first half turned with its counterpart in the second."""
    half = x.shape[-1] // 2
    return x * cosines + mx.concatenate([x[..., half:], x[..., :half]], axis=-1) * sines


def _kind(rope: Any, size: Any) -> bytes | None:
    """What tells a rotary embedding of ``size`` from others; None if ``turn`` does not do exactly that."""
    places = mx.array([0, 1, 77, 12345])
    try:
        x = mx.random.normal((places.size, 1, 1, size), key=mx.random.key(0))
        known = turns(lambda x: rope(x, offset=places), x.shape)
        is_same = mx.array_equal(turn(x, *known), rope(x, offset=places)).item()
        return np.array(mx.stack(list(known))).tobytes() if is_same else None
    except ERRORS:
        return None


class Recorder(StandIn):
    """Keeps the last output of a part of a view, the hidden states."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self._output: Any = None
        self._instead: mx.array | None = None

    @classmethod
    def put_into(cls, owner: Any, name: Any) -> "Recorder":
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
        output = output[0] if isinstance(output, tuple) else output  # what else a layer hands on
        if not isinstance(output, mx.array) or output.ndim != 3:
            raise ValueError("its hidden states cannot be read")
        return output

    def play(self, output: mx.array) -> None:
        """Give ``output`` at the next call instead of running."""
        self._instead = output


def leaves(caches: Iterable[Any]) -> Iterator[Any]:
    """mlx-lm's caches, those in lists of caches one by one."""
    for cache in caches:
        yield from leaves(cache.caches) if isinstance(cache, CacheList) else [cache]


def with_each(caches: Iterable[Any], stand_in: Callable[[Any], Any]) -> list[Any]:
    """What stands for each of mlx-lm's caches, in lists as they are."""
    # A local function that calls itself would be a cycle, and keep the buffers that it knows.
    return [
        CacheList(*with_each(cache.caches, stand_in)) if isinstance(cache, CacheList) else stand_in(cache)
        for cache in caches
    ]


def parts(module: Any) -> list[Any]:
    """All that decides what a module computes: it is as it was if each part is the same object as before."""
    if isinstance(module, list | tuple):
        return [part for item in module for part in parts(item)]
    if not isinstance(module, dict):
        return [module]
    own = vars(module).values() if isinstance(module, nn.Module) else ()
    return [module, *own, *module, *(part for item in module.values() for part in parts(item))]


def view(module: Any, tape: Tape, weights: Iterator[mx.array] | None = None) -> Any:
    """A twin of ``module``, with its own arrays or these ``weights``, whose rotary embeddings take nodes."""
    if isinstance(module, mx.array):
        return module if weights is None else next(weights)
    if isinstance(module, StandIn):
        return view(module.inner, tape, weights)
    if isinstance(module, list | tuple):
        return type(module)(view(item, tape, weights) for item in module)
    if not isinstance(module, dict):
        return module
    twin = copy.copy(module)
    for name, child in module.items():
        child = child.inner if isinstance(child, NodeRope) else child
        is_rope = name in ROPE_NAMES and callable(child)
        twin[name] = NodeRope(child, tape) if is_rope else view(child, tape, weights)
    return twin
