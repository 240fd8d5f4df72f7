"""A drafter's memory of the text: attention over what it noted of every token that the model has read.

What is noted of a token, its *entry*, is a key and a value for each of M heads, of the token's embedding
and of the context after it. Every depth of a draft queries all entries, older ones at a disadvantage that
grows with the logarithm of the distance (KERPLE, arXiv 2205.09921), and a sink, which gives nothing.

Entries are rows as those of the model's own layers. Only drafters that have a memory need this file.

A small draft vocabulary lacks names and the words of a subject, which texts repeat. So a drafter with a
memory may also draft *rare tokens*, those of the text that its vocabulary lacks: the last K of them, whose
logits are products of their embeddings in the base model. That costs no row of the head.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import KVCache, RotatingKVCache

from ..decoding.layers import Rows, places
from .drafter import MEMORY_EPS, Drafter
from .fused import FusedDrafter

Embed = Callable[[mx.array], mx.array]  # token ids [...] -> the base model's embeddings [..., H]


@dataclass
class Rare:
    """K tokens of each text that are not in the draft vocabulary."""

    tokens: mx.array  # [B, K]
    embeddings: mx.array  # [B, H, K]
    shift: mx.array  # [B, 1, K] added to their logits: minus infinity where there is none, or it comes again


@dataclass
class Memory:
    """What queries are shown of a drafter's memory."""

    drafter: Drafter
    keys: mx.array  # [B, M, T, Dh]
    values: mx.array  # [B, M, T, Dh]
    bias: mx.array  # [B, M, n or 1, T], see ``bias``
    rare: Rare | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """``x`` [..., B, n, exit_dim] and what it finds."""
        drafter = self.drafter
        queries = drafter.memory_q_norm(_heads(drafter, drafter.memory_q(x)))  # [..., B, M, n, Dh]
        how = attend_at_once if mx.default_device().type == mx.gpu and x.ndim == 3 else attend
        found = how(queries, self.keys, self.values, self.bias, drafter.memory_sink)
        after: mx.array = x + drafter.memory_out(found.swapaxes(-3, -2).reshape(*x.shape[:-1], -1))
        return after


class MemoryDrafter(FusedDrafter):
    """A drafter with a memory as it decodes."""

    def __init__(self, drafter: Drafter) -> None:
        super().__init__(drafter)
        self._is_rare: mx.array | None = None  # [V]
        if drafter.config.rare_tokens and self._places is not None:
            self._is_rare = self._places < 0
            mx.eval(self._is_rare)

    def make_cache(self, held: int) -> Any:
        """mlx-lm's cache for the entries, in which those of the first ``held`` tokens give nothing."""
        config = self.config
        window, heads, size = config.memory_window, config.memory_heads, config.memory_head_size
        cache: Any = KVCache() if window is None else RotatingKVCache(window)
        if held:
            zeros = mx.zeros((1, heads, held, size), self.start.dtype)
            cache.update_and_fetch(zeros, zeros)
        return cache

    def remember(self, context: mx.array, embedding: mx.array) -> Rows:
        """Entries of tokens with this context [B, T, F] and embedding [B, T, H]."""
        return entries(self._drafter, self.prepare(context), embedding)

    def look_back(
        self,
        rows: Rows,
        count: mx.array,
        columns: int,
        history: mx.array | None = None,
        embed: Embed | None = None,
    ) -> Memory:
        """What queries after the first ``count`` [B] tokens are shown of the buffers [B, M, C, Dh].

        Args:
            columns: of the first rows, or all of a ring.
            history: [B, C'], the text, its last token at ``count``; None: no rare tokens are drafted.
            embed: the base model's, if there is a history.
        """
        keys, values = (part[:, :, :columns] for part in rows)
        place = places(count, keys.shape[2])  # [B, C]
        distance = mx.where(place >= 0, count[:, None] - 1 - place, -1)
        rare = None
        if self._is_rare is not None and history is not None and embed is not None:
            tokens, shown = find_rare(self._is_rare, history, count, self.config.rare_tokens)
            some = self._drafter.rare_bias
            shift = mx.where(shown[:, None], some, mx.array(-mx.inf, some.dtype))
            rare = Rare(tokens, embed(tokens).astype(some.dtype).swapaxes(-1, -2), shift)
        return Memory(self._drafter, keys, values, bias(self._drafter, distance[:, None]), rare)

    def logits(self, prepared: mx.array, state: mx.array, memory: Memory | None = None) -> mx.array:
        """As ``Drafter.logits``, of [B, n, ...]; [B, n, Vd + K] with those of rare tokens."""
        x = self.body(prepared, state, memory)
        logits: mx.array = self._drafter.lm_head[-1](x)
        if memory is None or memory.rare is None:
            return logits
        more = mx.addmm(memory.rare.shift, self._drafter.rare_proj(x), memory.rare.embeddings)  # [B, n, K]
        return mx.concatenate([logits, more], axis=-1)

    def to_target(self, index: mx.array, memory: Memory | None = None) -> mx.array:
        """Token ids for places [B, n] in the logits."""
        if memory is None or memory.rare is None:
            return super().to_target(index)
        known, rare = self.config.head_outputs, memory.rare.tokens
        tokens = super().to_target(mx.minimum(index, known - 1))
        more = mx.take_along_axis(rare, mx.maximum(index.astype(mx.int32) - known, 0), axis=1)
        return mx.where(index < known, tokens, more)

    def from_target(self, tokens: mx.array, memory: Memory | None = None) -> mx.array:
        """Places [B, W] in the logits for token ids; -1: they have none."""
        place = super().from_target(tokens)
        if memory is None or memory.rare is None:
            return place
        shown = memory.rare.shift > -mx.inf  # [B, 1, K]
        same = (memory.rare.tokens[:, None] == tokens[..., None]) & shown  # [B, W, K]
        rare = self.config.head_outputs + mx.argmax(same, axis=-1).astype(mx.int32)
        return mx.where((place < 0) & same.any(axis=-1), rare, place)


def find_rare(is_rare: mx.array, history: mx.array, count: mx.array, size: int) -> tuple[mx.array, mx.array]:
    """The last ``size`` tokens of texts that are rare.

    Args:
        is_rare: [V] bool.
        history: [B, C], negative where it is not known.
        count: [B], the place of each text's last token.

    Returns:
        [B, K] tokens, and whether there is one there that is not there before: [B, K] bool.
    """
    place, size = mx.arange(history.shape[1]), min(size, history.shape[1])
    known = (history >= 0) & (place <= count[:, None])  # [B, C]
    found = known & is_rare[mx.clip(history, 0, is_rare.size - 1)]
    last = mx.topk(mx.where(found, place, -1), size, axis=1)  # [B, K], in no order
    tokens = mx.take_along_axis(history, mx.maximum(last, 0), axis=1)
    earlier = (mx.arange(size) < mx.arange(size)[:, None]) & (last >= 0)[:, None]  # [B, K, K]
    again = ((tokens[:, None] == tokens[..., None]) & earlier).any(axis=-1)
    return tokens, (last >= 0) & ~again


def read_texts(drafter: Drafter, context: mx.array, embedding: mx.array, place: mx.array) -> Memory:
    """What is shown at some places of whole texts, for training: the tokens up to there.

    Args:
        context: [B, T, F], after reading each token.
        embedding: [B, T, H], of the tokens.
        place: [B, n].
    """
    halves = drafter.halves()
    assert halves is not None
    keys, values = entries(drafter, halves[0](context), embedding)
    return Memory(drafter, keys, values, bias(drafter, place[..., None] - mx.arange(context.shape[1])))


def entries(drafter: Drafter, prepared: mx.array, embedding: mx.array) -> Rows:
    """Keys and values of T tokens, each [B, M, T, Dh].

    Args:
        prepared: [B, T, exit_dim], the context's half of ``input_proj`` after reading each token.
        embedding: [B, T, H], of the tokens.
    """
    both = drafter.memory_kv(mx.concatenate([prepared, embedding], axis=-1))  # [B, T, 2 * M * Dh]
    keys, values = (_heads(drafter, half) for half in mx.split(both, 2, axis=-1))
    return [mx.fast.rms_norm(keys, None, MEMORY_EPS), values]


def bias(drafter: Drafter, distance: mx.array) -> mx.array:
    """What is added to the scores of entries.

    Args:
        distance: [B, n, T], from the last token read to each entry's; negative: it is not seen.
    Returns:
        [B, M, n, T]
    """
    slope = nn.softplus(drafter.memory_decay.astype(mx.float32))[:, None, None]
    shown = (distance >= 0) & (distance < (drafter.config.memory_window or mx.inf))
    kernel = -slope * mx.log1p(mx.maximum(distance, 0).astype(mx.float32))[:, None]
    found: mx.array = mx.where(shown[:, None], kernel, -mx.inf).astype(drafter.memory_decay.dtype)
    return found


def _heads(drafter: Drafter, x: mx.array) -> mx.array:
    return x.reshape(*x.shape[:-1], -1, drafter.config.memory_head_size).swapaxes(-3, -2)


def attend_at_once(
    queries: mx.array, keys: mx.array, values: mx.array, bias: mx.array, sink: mx.array
) -> mx.array:
    """Attention [B, M, n, Dh] with a score [M] more, which gives nothing; on a GPU in one kernel."""
    scale = queries.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=bias, sinks=sink)


def attend(queries: mx.array, keys: mx.array, values: mx.array, bias: mx.array, sink: mx.array) -> mx.array:
    """The same, also of queries [..., B, M, n, Dh].

    It takes half the time on a CPU, where MLX's power takes a third of its exponential's.
    """
    scores = (queries.shape[-1] ** -0.5 * queries) @ keys.swapaxes(-1, -2) + bias  # [B, M, n, T]
    sink = sink[:, None, None]
    top = mx.stop_gradient(mx.maximum(scores.max(axis=-1, keepdims=True), sink))
    powers = mx.power(math.e, scores - top)
    total = powers.sum(axis=-1, keepdims=True) + mx.power(math.e, sink - top)
    return (powers @ values) / total
