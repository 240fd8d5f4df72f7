"""How the target picks a token: one implementation for plain and for speculative decoding."""

import math
from dataclasses import dataclass

import mlx.core as mx


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
        unfiltered = self.top_p in (0, 1) and self.top_k == 0 and self.min_p == 0
        logits = logits.astype(mx.float32) if unfiltered else self.filtered(logits)
        temperature = min(max(self.temperature, 1e-30), 1e30)  # what float32 can divide by
        logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
        if key.ndim == 1:
            return mx.random.categorical(logits, axis=-1, key=key).astype(mx.int32)
        draw = mx.vmap(lambda k: mx.random.gumbel((logits.shape[-1],), key=k))
        noise = draw(key.reshape(-1, 2)).reshape(logits.shape)
        return mx.argmax(logits + noise, axis=-1).astype(mx.int32)

    def filtered(self, logits: mx.array) -> mx.array:
        """Log-probabilities [..., V] in float32, -inf where a filter drops the token."""
        logits = logits.astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        keep = logprobs >= self._threshold(logprobs)
        return mx.where(keep, logprobs, -mx.inf)

    def _threshold(self, logprobs: mx.array) -> mx.array:
        """The least log-probability [..., 1] that passes all filters."""
        thresholds = [mx.full((*logprobs.shape[:-1], 1), -mx.inf)]
        vocabulary = logprobs.shape[-1]
        by_rank = 0 < self.top_k < vocabulary
        if by_rank or 0 < self.top_p < 1:
            descending = -mx.sort(-logprobs, axis=-1)
        if by_rank:
            thresholds.append(descending[..., self.top_k - 1 : self.top_k])
        if 0 < self.top_p < 1:
            probabilities = mx.exp(descending)
            above = mx.cumsum(probabilities, axis=-1, inclusive=False)  # mass of likelier tokens
            last = mx.maximum((above < self.top_p).sum(axis=-1, keepdims=True) - 1, 0)
            thresholds.append(mx.take_along_axis(descending, last, axis=-1))
        if self.min_p > 0:
            thresholds.append(logprobs.max(axis=-1, keepdims=True) + math.log(self.min_p))
        return mx.max(mx.stack(thresholds), axis=0)


def keys_at(key: mx.array, position: mx.array) -> mx.array:
    """Random keys [B, N, 2] for places [B, N] of B texts, derived from ``key`` [2].

    A place has its own randomness whatever is drafted, so a seed gives the same text with every draft
    shape. Nodes at one depth share it, and only one of them can be on the accepted path.
    """
    row = mx.arange(position.shape[0], dtype=mx.uint32)[:, None]
    first = mx.broadcast_to(key[0] + row, position.shape)
    return mx.stack([first, key[1] + position.astype(mx.uint32)], axis=-1)
