"""Filters: which tokens a text may draw at all. Only texts that use one need this file."""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

import mlx.core as mx
import numpy as np

from .beam import LOWEST
from .chance import at_each, of_nodes
from .topk import FEW, top_k

GUESSED = 16  # of the largest logits, by which it is guessed what top-p keeps
COIN = 0x9E3779B9  # tells XTC's random numbers from those that pick the token


def filtered(
    logits: mx.array, seeds: mx.array, filters: Mapping[str, mx.array], depths: mx.array | None = None
) -> mx.array:
    """Logits [B, N, V], the largest 0, in float32; -inf where a filter drops the token."""
    per_text = _per_text(filters)
    kept = logits
    if "top_p" in per_text:
        kept = mx.where(among_likeliest(logits, per_text["top_p"]), kept, -mx.inf)
    if "min_p" in per_text:
        passes = logits >= per_text["min_p"]
        if "min_tokens" in per_text:
            passes = passes | among_largest(logits, per_text["min_tokens"])
        kept = mx.where(passes, kept, -mx.inf)
    if "xtc_probability" in per_text:
        kept = mx.where(_xtc_drops(kept, seeds, filters, depths), -mx.inf, kept)
    if "few" in per_text:
        best, _ = top_k(mx.maximum(kept, -3e38), FEW)  # [B, N, FEW]
        last = mx.broadcast_to(per_text["few"], (*best.shape[:-1], 1)) - 1
        passes = (kept >= mx.take_along_axis(best, mx.clip(last, 0, FEW - 1), axis=-1)) | (last >= FEW)
        kept = mx.where(passes, kept, -mx.inf)
    if "top_k" in per_text:
        kept = mx.where(among_largest(kept, per_text["top_k"]), kept, -mx.inf)
    return kept


def roughly_filtered(logits: mx.array, filters: Mapping[str, mx.array]) -> mx.array:
    """A drafter's logits [B, W, V_draft], in float32; ``LOWEST`` where a filter would drop the token.

    Drafts need not be exact: only the largest few are looked at. XTC, which drops the likeliest, is left out.
    """
    per_text = _per_text(filters)
    logits = logits.astype(mx.float32)
    best, _ = top_k(mx.maximum(logits, LOWEST), min(FEW, logits.shape[-1]))  # [B, W, FEW]
    passes = mx.full(best.shape, True)
    if "top_p" in per_text:
        share = mx.exp(best - mx.logsumexp(logits, axis=-1, keepdims=True))
        passes = passes & ((mx.cumsum(share, axis=-1) - share < per_text["top_p"]) | (per_text["top_p"] >= 1))
    if "min_p" in per_text:
        least = best[..., :1] + per_text["min_p"]
        passes = passes & ((best >= least) | (mx.arange(best.shape[-1]) < per_text.get("min_tokens", 1)))
    for name in ("few", "top_k"):
        if name in per_text:
            passes = passes & (mx.arange(best.shape[-1]) < per_text[name])
    last = mx.where(passes, best, mx.inf).min(axis=-1, keepdims=True)
    last = mx.where(passes.all(axis=-1, keepdims=True), -mx.inf, last)  # all of them pass, and perhaps more
    return mx.where(logits >= last, logits, LOWEST)


def drawn_if_sure(logits: mx.array, noise: mx.array, filters: Mapping[str, mx.array]) -> mx.array:
    """The tokens [B, N] that ``filtered`` with top-p leads to, but without XTC; -1 where two passes over the
    vocabulary, in place of its 31, do not tell.

    Top-p is guessed from the largest few logits. The token that is drawn by this guess is the right one if it
    belongs to those that are kept, and if those that the guess keeps reach ``p``: then no other does.

    Args:
        logits: [B, N, V], the largest 0, in float32.
        noise: [B, N, V].
        filters: of B texts.
    """
    per_text = _per_text(filters)
    masses, bits, goal = _masses(logits, per_text["top_p"])
    best, index = top_k(mx.maximum(logits, -3e38), min(GUESSED, logits.shape[-1]))  # [B, N, GUESSED]
    best_bits = mx.take_along_axis(bits.reshape(logits.shape), index, axis=-1)
    reached = mx.cumsum(best_bits.view(mx.float32), axis=-1) >= goal[..., 0]
    reached = reached & (per_text["top_p"] < 1)
    end = mx.argmax(reached, axis=-1, keepdims=True)
    least = mx.where(reached.any(axis=-1, keepdims=True), mx.take_along_axis(best_bits, end, axis=-1), 0)
    guess = bits.reshape(logits.shape) >= least
    if "few" in per_text:
        last = mx.broadcast_to(per_text["few"], least.shape) - 1
        lowest = mx.take_along_axis(best, mx.clip(last, 0, best.shape[-1] - 1), axis=-1)
        guess = guess & ((logits >= lowest) | (last >= GUESSED))
    if "min_p" in per_text and "min_tokens" not in per_text:
        guess = guess & (logits >= per_text["min_p"])
    token = mx.argmax(mx.where(guess, logits, -mx.inf) + noise, axis=-1, keepdims=True)  # [B, N, 1]
    own, own_bits = (mx.take_along_axis(x.reshape(logits.shape), token, axis=-1) for x in (logits, bits))
    larger = (logits > own).sum(axis=-1, keepdims=True)
    sure = (_total(masses * (bits > own_bits[..., None])) < goal)[..., 0] | (per_text["top_p"] >= 1)
    sure = sure & ((least == 0) | (_total(masses * (bits >= least[..., None])) >= goal)[..., 0])
    for name in ("few", "top_k"):
        if name in per_text:
            sure = sure & (larger < per_text[name])
    if "min_p" in per_text:
        sure = sure & ((own >= per_text["min_p"]) | (larger < per_text.get("min_tokens", 0)))
    return mx.where(sure, token.astype(mx.int32), -1)[..., 0]


def _per_text(filters: Mapping[str, mx.array]) -> dict[str, mx.array]:
    return {name: value[:, None, None] for name, value in filters.items() if value.ndim == 1}  # [B, 1, 1]


def _xtc_drops(
    kept: mx.array, seeds: mx.array, filters: Mapping[str, mx.array], depths: mx.array | None
) -> mx.array:
    """Which tokens [B, N, V] XTC drops, by a coin of each node: all above the threshold but the last."""
    chance, threshold = (filters[f"xtc_{name}"][:, None, None] for name in ("probability", "threshold"))
    probabilities = mx.softmax(kept, axis=-1)
    above = mx.where(probabilities > threshold, probabilities, mx.inf)
    drops = probabilities > above.min(axis=-1, keepdims=True)
    special = filters["xtc_special"][:, None, :, None] == mx.arange(kept.shape[-1])  # [B, 1, K, V]
    seeds = seeds ^ mx.array(COIN, mx.uint32)
    coin = at_each(lambda seed: mx.random.uniform(shape=(1,), key=seed), seeds)
    coin = of_nodes(coin, depths)  # [B, N, 1]
    return drops & ~special.any(axis=-2) & (coin <= chance) & (chance > 0)


def among_largest(logits: mx.array, k: mx.array) -> mx.array:
    """Which of ``logits`` [..., V], none above 0, are not below the ``k``-th largest; [..., 1]."""
    bits = mx.abs(logits).view(mx.int32)
    last = _largest(lambda t: (bits < t).sum(axis=-1, keepdims=True) < k, math.inf, bits[..., :1])
    return bits <= last


def among_likeliest(logits: mx.array, p: mx.array) -> mx.array:
    """Which of ``logits`` [..., V], the largest 0, it takes to reach the probability ``p`` [..., 1]."""
    masses, bits, goal = _masses(logits, p)
    last = _largest(lambda t: _total(masses * (bits >= t)) >= goal, 1.0, bits[..., :1, :1])
    return (bits >= last).reshape(logits.shape) | (p >= 1)  # rounding of the sum must not drop any then


def _masses(logits: mx.array, p: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """What logits [..., V] stand for, in a grid that is added up well, their bits, and ``p`` of the total."""
    masses = mx.exp(logits).reshape(*logits.shape[:-1], math.gcd(logits.shape[-1], 128), -1)
    return masses, masses.view(mx.int32), p[..., None] * _total(masses)


def _total(masses: mx.array) -> mx.array:
    return masses.sum(axis=-2, keepdims=True).sum(axis=-1, keepdims=True)  # [..., 1, 1]


def _largest(holds: Callable[[mx.array], mx.array], most: float, like: mx.array) -> mx.array:
    """The largest bit pattern, up to that of ``most``, that holds; of the shape of ``like``.

    Bit patterns of numbers that are not negative have the order of the numbers, and ``holds`` is true up
    to one of them. Bisecting them is exact after 31 passes over the vocabulary at most, without a sort.
    """
    last = int(np.array(most, np.float32).view(np.int32))
    powers = [1 << bit for bit in reversed(range(last.bit_length()))]
    steps = [*mx.array([*powers, 0])]  # constants would make compiled steps contain a kernel for each
    trial: mx.array = mx.zeros(like.shape, mx.int32) + steps[0]
    for step, following in pairwise(steps):
        trial = mx.where(holds(trial), trial, trial - step) + following
    return trial
