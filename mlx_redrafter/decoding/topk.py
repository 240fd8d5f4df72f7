"""The k largest of many values without sorting them all (MLX's own top-k is a full sort on GPUs)."""

from math import isqrt

import mlx.core as mx

FEW = 64  # top-k finds up to this many tokens; for more, it finds the last one's logit by counting


def top_k(scores: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """The ``k`` largest values along the last axis and their indices, best first.

    Two levels: every one of the k largest lies in one of the k blocks with the largest maxima. Of the
    blocks' maxima and of the blocks chosen, about sqrt(V * k) values each are sorted.

    Args:
        scores: [..., V], no NaN, larger than -inf.
        k: at most V.

    Returns:
        Values [..., k] and indices [..., k] (int32).
    """
    size = scores.shape[-1]
    assert 1 <= k <= size
    if k == 1:
        index = mx.argmax(scores, axis=-1, keepdims=True).astype(mx.int32)  # [..., 1]
        return mx.take_along_axis(scores, index, axis=-1), index
    width = 1 << isqrt(size // k).bit_length() - 1  # a power of two near the square root of V / k
    if width < 4:
        return _sorted(scores, k)
    blocks = -(-size // width)  # more than k
    padding = [(0, 0)] * (scores.ndim - 1) + [(0, blocks * width - size)]
    grid = mx.pad(scores, padding, constant_values=-mx.inf).reshape(*scores.shape[:-1], blocks, width)
    _, chosen = _sorted(grid.max(axis=-1), k)  # [..., k]
    pool = mx.take_along_axis(grid, chosen[..., None], axis=-2)  # [..., k, width]
    values, place = _sorted(pool.reshape(*chosen.shape[:-1], k * width), k)  # [..., k]
    block = mx.take_along_axis(chosen, place // width, axis=-1)
    return values, block * width + place % width


def _sorted(scores: mx.array, k: int) -> tuple[mx.array, mx.array]:
    order = mx.argsort(-scores, axis=-1)[..., :k].astype(mx.int32)
    return mx.take_along_axis(scores, order, axis=-1), order
