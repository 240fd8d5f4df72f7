"""mlx-lm's caches given what a text's layers hold, and quantized as mlx-lm does.

Only texts that begin or end in such caches, are kept for reuse, or have quantized keys and values need it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from ..decoding.layers import Layers, Quantization, in_order
from .hooks import leaves
from .target import Target, name_of


def to_prompt_cache(layers: Layers, rows: int, caches: list[Any], how: Quantization | None = None) -> None:
    """Give mlx-lm caches the committed buffers of one text, ``rows`` of which are valid.

    If these have been quantized since, by ``how``, quantized caches take the places of the given ones.
    """
    if layers.rows and len(layers.rows[0]) > 2:
        quantize(caches, how and replace(how, start=0))
    fill(caches, in_order(layers, rows), rows)


def fill(caches: Sequence[Any], layers: Layers, rows: int) -> None:
    """Give mlx-lm caches what the layers, ``in_order``, remember of a text of ``rows`` tokens."""
    kept, states = iter(layers.rows), iter(layers.states)
    cache: Any
    for cache in leaves(caches):
        if isinstance(cache, ArraysCache):
            cache.state = [*next(states)], None, None
        else:
            parts = next(kept)
            cache.keys, cache.values = parts if len(parts) == 2 else (parts[:3], parts[3:])
        if isinstance(cache, RotatingKVCache):
            cache.keys, cache.values = (part[:, :, -cache.max_size :] for part in parts)
            cache._idx = cache.keys.shape[2]
        cache.offset = rows


def quantize(caches: list[Any], how: Quantization | None) -> None:
    """Put quantized caches in the places of mlx-lm caches that hold ``how.start`` tokens or more."""
    if how is not None:
        maybe_quantize_kv_cache(caches, how.start, how.group_size, how.bits)


def check_quantized(target: Target, how: Quantization) -> None:
    """Raise ``ValueError`` if mlx-lm cannot decode with the model's keys and values quantized so."""
    caches = target.make_cache()
    try:
        if {type(cache) for cache in caches} != {KVCache}:
            raise ValueError("its layers remember more than keys and values, or a window of them only")
        for _ in range(2):  # nothing is computed
            target.forward(mx.array([[0]]), caches)
            quantize(caches, replace(how, start=0))
    except (ValueError, TypeError, AttributeError) as error:
        reason, *_ = str(error).partition("\n")
        raise ValueError(
            f"{name_of(target.model)} cannot be decoded with keys and values of {how.bits} bits in groups of "
            f"{how.group_size} ({reason}): give others, or leave kv_bits out."
        ) from error
