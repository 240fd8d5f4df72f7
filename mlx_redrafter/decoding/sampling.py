"""How the target picks a token: one implementation for plain and for speculative decoding."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np

from .topk import top_k

FEW = 64  # top-k of at most V / FEW tokens finds them; of more, it finds the last one's logit by counting


@dataclass(frozen=True)
class Sampling:
    """Temperature and filters, with mlx-lm's meanings: filters see probabilities at temperature 1.

    Attributes:
        temperature: 0 picks the likeliest token.
        top_p: keep the likeliest tokens that together reach this probability (0 or 1: off).
        top_k: keep this many of the likeliest tokens (0: off); ties with the last one stay.
        min_p: drop tokens less likely than this share of the likeliest one's probability (0: off).

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature {self.temperature} is not usable: give 0 (greedy) or more.")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top-p {self.top_p} is not a probability: give 0 to 1.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min-p {self.min_p} is not a probability: give 0 to 1.")
        if self.top_k < 0:
            raise ValueError(f"top-k {self.top_k} is negative: give 0 (off) or more.")

    def pick(self, logits: mx.array, key: mx.array) -> mx.array:
        """One token for each row of ``logits`` [..., V]: [...] int32.

        ``key`` is one for all rows [2], which are then sampled independently, or one for each [..., 2].
        """
        if self.temperature == 0:
            return mx.argmax(logits, axis=-1).astype(mx.int32)
        temperature = min(max(self.temperature, 1e-30), 1e30)  # what float32 can divide by
        logits = self.filtered(logits) / temperature
        if key.ndim == 1:
            return mx.random.categorical(logits, axis=-1, key=key).astype(mx.int32)
        draw = mx.vmap(lambda k: mx.random.gumbel((logits.shape[-1],), key=k))
        noise = draw(key.reshape(-1, 2)).reshape(logits.shape)
        return mx.argmax(logits + noise, axis=-1).astype(mx.int32)

    def filtered(self, logits: mx.array) -> mx.array:
        """Logits [..., V] in float32, less the largest one; -inf where a filter drops the token."""
        logits = logits.astype(mx.float32)
        logits = kept = logits - logits.max(axis=-1, keepdims=True)
        for passes in self._filters(logits):
            kept = mx.where(passes, kept, -mx.inf)
        return kept

    def _filters(self, logits: mx.array) -> Iterator[mx.array]:
        """Which tokens pass each filter, [..., V]; the largest of ``logits`` are 0."""
        if self.min_p > 0:
            yield logits >= math.log(self.min_p)
        by_rank, by_mass = 0 < self.top_k < logits.shape[-1], 0 < self.top_p < 1
        if by_rank and self.top_k * FEW <= logits.shape[-1]:
            best, _ = top_k(logits, self.top_k)  # [..., K]
            last = best[..., -1:]
            if by_mass:  # if the best K do not reach it, all of them pass
                probabilities = mx.exp(best - mx.logsumexp(logits, axis=-1, keepdims=True))
                likelier = mx.cumsum(probabilities, axis=-1, inclusive=False)
                count = (likelier < self.top_p).sum(axis=-1, keepdims=True)
                last = mx.take_along_axis(best, count - 1, axis=-1)
            yield logits >= last
        else:
            if by_rank:
                yield among_largest(logits, self.top_k)
            if by_mass:
                yield among_likeliest(logits, self.top_p)


def among_largest(logits: mx.array, k: int) -> mx.array:
    """Which of ``logits`` [..., V], none above 0, are not below the k-th largest."""
    bits = mx.abs(logits).view(mx.int32)
    last = _largest(lambda t: (bits < t).sum(axis=-1, keepdims=True) < k, 0, math.inf, bits[..., :1])
    return bits <= last


def among_likeliest(logits: mx.array, p: float) -> mx.array:
    """Which of ``logits`` [..., V], the largest of them 0, it takes to reach the probability ``p``."""
    vocabulary = logits.shape[-1]
    masses = mx.exp(logits).reshape(*logits.shape[:-1], math.gcd(vocabulary, 128), -1)
    bits = masses.view(mx.int32)

    def total(x: mx.array) -> mx.array:
        return x.sum(axis=-2, keepdims=True).sum(axis=-1, keepdims=True)

    goal = p * total(masses)
    least = (1 - p) / vocabulary  # all tokens below it have less than 1 - p together
    last = _largest(lambda t: total(masses * (bits >= t)) >= goal, least, 1, bits[..., :1, :1])
    return (bits >= last).reshape(logits.shape)


def _largest(holds: Callable[[mx.array], mx.array], least: float, most: float, like: mx.array) -> mx.array:
    """The largest bit pattern from ``least`` to ``most`` that holds, of the shape of ``like``.

    Bit patterns of numbers that are not negative have the order of the numbers, and ``holds`` is true up
    to one of them. Bisecting them is exact after 31 passes over the vocabulary at most, without a sort.
    """
    first, last = np.array([least, most], np.float32).view(np.int32).tolist()
    powers = [1 << bit for bit in reversed(range((last - first).bit_length()))]
    steps = [*mx.array([*powers, 0])]  # constants would make compiled steps contain a kernel for each
    trial: mx.array = mx.full(like.shape, first, mx.int32) + steps[0]
    for step, following in pairwise(steps):
        trial = mx.where(holds(trial), trial, trial - step) + following
    return trial


def keys_at(key: mx.array, position: mx.array) -> mx.array:
    """Random keys [B, N, 2] for places [B, N] of B texts, derived from ``key`` [2].

    A place has its own randomness whatever is drafted, so a seed gives the same text with every draft
    shape. Nodes at one depth share it, and only one of them can be on the accepted path.
    """
    row = mx.arange(position.shape[0], dtype=mx.uint32)[:, None]
    first = mx.broadcast_to(key[0] + row, position.shape)
    return mx.stack([first, key[1] + position.astype(mx.uint32)], axis=-1)
