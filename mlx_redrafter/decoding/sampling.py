"""How the target picks tokens: one implementation for plain and for speculative decoding.

Each text has its own settings. A step is given them as arrays with an entry for each text, and only those
that some text uses; a text that does not use one has a neutral value there, which changes nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np

from .topk import top_k

FEW = 64  # top-k finds up to this many tokens; for more, it finds the last one's logit by counting
CONTEXT = 20  # how many tokens a penalty looks back, mlx-lm's default
COIN = 0x9E3779B9  # tells XTC's random numbers from those that pick the token
Settings = Mapping[str, mx.array]


@dataclass(frozen=True)
class Sampling:
    """How tokens of one text are picked, with mlx-lm's meanings: filters see probabilities at temperature 1.

    Attributes:
        temperature: 0 picks the likeliest token.
        top_p: keep the likeliest tokens that together reach this probability (0 or 1: off).
        top_k: keep this many of the likeliest tokens (0: off); ties with the last one stay.
        min_p: drop tokens less likely than this share of the likeliest one's probability (0: off).
        min_tokens_to_keep: that ``min_p`` must leave.
        xtc_probability: how often all tokens above ``xtc_threshold`` but the least likely are dropped.
        xtc_threshold: a probability, at most 0.5.
        xtc_special_tokens: token ids that XTC never drops.
        repetition_penalty: of the tokens among the last ``repetition_context_size``: positive logits are
            divided by it, negative ones multiplied (1 or 0: off).
        presence_penalty: subtracted from the logit of each token among the last ``presence_context_size``.
        frequency_penalty: subtracted as often as the token stands there.
        logit_bias: pairs of a token id and what is added to its logit.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.0
    xtc_special_tokens: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    repetition_context_size: int = CONTEXT
    presence_penalty: float = 0.0
    presence_context_size: int = CONTEXT
    frequency_penalty: float = 0.0
    frequency_context_size: int = CONTEXT
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature {self.temperature} is not usable: give 0 (greedy) or more.")
        for name, value, most in (
            ("top-p", self.top_p, 1),
            ("min-p", self.min_p, 1),
            ("xtc-probability", self.xtc_probability, 1),
            ("xtc-threshold", self.xtc_threshold, 0.5),
        ):
            if not 0 <= value <= most:
                raise ValueError(f"{name} {value} is not usable: give 0 to {most}.")
        for name, number, least in (
            ("top-k", self.top_k, 0),
            ("min-tokens-to-keep", self.min_tokens_to_keep, 1),
            ("repetition-context-size", self.repetition_context_size, 1),
            ("presence-context-size", self.presence_context_size, 1),
            ("frequency-context-size", self.frequency_context_size, 1),
        ):
            if number < least:
                raise ValueError(f"{name} {number} is not usable: give {least} or more.")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty >= 0):
            raise ValueError(
                f"repetition penalty {self.repetition_penalty} is not usable: give 0 (off) or more."
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(
                    f"{name.replace('_', ' ')} {getattr(self, name)} is not usable: give a number."
                )
        if any(token < 0 or math.isnan(bias) for token, bias in self.logit_bias):
            raise ValueError(f"logit bias {dict(self.logit_bias)} is not usable: give token ids and numbers.")

    @property
    def filters(self) -> dict[str, float]:
        """The settings that change how a token is drawn, by the names that ``draw`` knows."""
        if self.temperature == 0:
            return {}
        used = {"temperature": min(max(self.temperature, 1e-30), 1e30)}  # float32 divides by it
        if 0 < self.top_p < 1:
            used["top_p"] = self.top_p
        if self.min_p > 0:
            used["min_p"] = math.log(self.min_p)
            if self.min_tokens_to_keep > 1:
                used["min_tokens"] = self.min_tokens_to_keep
        if self.xtc_probability > 0:
            used |= {"xtc_probability": self.xtc_probability, "xtc_threshold": self.xtc_threshold}
        if self.top_k > 0:
            used["top_k"] = self.top_k
        return used


NEUTRAL = {
    "temperature": 0.0,
    "top_p": 1.0,
    "min_p": -math.inf,
    "min_tokens": 1,
    "xtc_probability": 0.0,
    "xtc_threshold": 0.0,
    "top_k": 1 << 30,
}


def filter_settings(samplings: Sequence[Sampling], vocabulary: int) -> dict[str, mx.array]:
    """What ``draw`` needs to know of B texts, arrays [B] (special tokens [B, K]); {} if all are greedy.

    Args:
        samplings: the texts' settings.
        vocabulary: V; top-k keeps no more.
    """
    used = [sampling.filters for sampling in samplings]
    found: dict[str, mx.array] = {}
    for name in dict.fromkeys(name for filters in used for name in filters):
        values = [filters.get(name, NEUTRAL[name]) for filters in used]
        if name in ("top_k", "min_tokens"):
            found[name] = mx.array([min(int(value), vocabulary) for value in values], mx.int32)
        else:
            found[name] = mx.array(values, mx.float32)
    if all(filters.get("top_k", 0) <= FEW <= vocabulary for filters in used) and "top_k" in found:
        found["few"] = found.pop("top_k")
    if "xtc_probability" in found:
        found["xtc_special"] = padded([sampling.xtc_special_tokens for sampling in samplings], -1)
    return found


def padded(rows: Sequence[Sequence[int]], filler: int) -> mx.array:
    """int32 [B, K] of B rows of numbers, K of the longest (at least 1)."""
    width = max(1, *(len(row) for row in rows))
    return mx.array([[*row, *[filler] * (width - len(row))] for row in rows], mx.int32)


def draw(
    logits: mx.array,
    seeds: mx.array,
    filters: Settings,
    depths: mx.array | None = None,
    noise: mx.array | None = None,
) -> mx.array:
    """A token for every node of every text: [B, N] int32.

    Args:
        logits: [B, N, V].
        seeds: [B, N, 2] of each node's random numbers; [B, L+1, 2] of each depth's with ``depths``.
        filters: from ``filter_settings``.
        depths: [B, N] of the nodes. V random numbers take long to make, and a depth needs them once.
        noise: [B, L+1, V] of ``noise_at``, if it is known already.
    """
    if "temperature" not in filters:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    logits = logits.astype(mx.float32)
    temperature = filters["temperature"][:, None, None]  # [B, 1, 1]
    kept = filtered(logits, seeds, filters, depths) / mx.where(temperature > 0, temperature, 1.0)
    if noise is None or noise.shape[-1] != logits.shape[-1]:
        noise = noise_at(seeds, logits.shape[-1])
    kept = kept + _of_nodes(noise, depths)[:, : logits.shape[1]]  # [B, N, V]; a chain may end early
    return mx.argmax(mx.where(temperature > 0, kept, logits), axis=-1).astype(mx.int32)


def noise_at(seeds: mx.array, vocabulary: int) -> mx.array:
    """What is added to logits [B, ..., V] before the largest is picked: Gumbel's, for seeds [B, ..., 2]."""
    return _at_each(lambda seed: mx.random.gumbel((vocabulary,), key=seed), seeds)


def foreseen(filters: Settings) -> bool:
    """Whether a drafter can tell what the noise leads to: it does not know what a filter will drop."""
    return "temperature" in filters and not filters.keys() & {*NEUTRAL, "few"} - {"temperature"}


def scaled(noise: mx.array, filters: Settings) -> mx.array:
    """The same for logits that are not divided by the temperatures: none for greedy texts."""
    temperature = filters["temperature"][:, None, None]  # [B, 1, 1]
    return mx.where(temperature > 0, temperature * noise, 0.0)


def filtered(
    logits: mx.array, seeds: mx.array, filters: Settings, depths: mx.array | None = None
) -> mx.array:
    """Logits [B, N, V] in float32, less the largest one; -inf where a filter drops the token."""
    per_text = {name: value[:, None, None] for name, value in filters.items() if value.ndim == 1}  # [B, 1, 1]
    kept = logits = logits - logits.max(axis=-1, keepdims=True)
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


def _xtc_drops(kept: mx.array, seeds: mx.array, filters: Settings, depths: mx.array | None) -> mx.array:
    """Which tokens [B, N, V] XTC drops, by a coin of each node: all above the threshold but the last."""
    chance, threshold = (filters[f"xtc_{name}"][:, None, None] for name in ("probability", "threshold"))
    probabilities = mx.softmax(kept, axis=-1)
    above = mx.where(probabilities > threshold, probabilities, mx.inf)
    drops = probabilities > above.min(axis=-1, keepdims=True)
    special = filters["xtc_special"][:, None, :, None] == mx.arange(kept.shape[-1])  # [B, 1, K, V]
    seeds = seeds ^ mx.array(COIN, mx.uint32)
    coin = _at_each(lambda seed: mx.random.uniform(shape=(1,), key=seed), seeds)
    coin = _of_nodes(coin, depths)  # [B, N, 1]
    return drops & ~special.any(axis=-2) & (coin <= chance) & (chance > 0)


def _at_each(random: Callable[[mx.array], mx.array], seeds: mx.array) -> mx.array:
    """Random numbers [B, N, ...] for seeds [B, N, 2], each as if there were no others."""
    numbers = mx.vmap(random)(seeds.reshape(-1, 2))
    return numbers.reshape(*seeds.shape[:-1], -1)


def _of_nodes(numbers: mx.array, depths: mx.array | None) -> mx.array:
    """Numbers [B, N, ...] of nodes, from those of their depths [B, L+1, ...]."""
    return numbers if depths is None else mx.take_along_axis(numbers, depths[..., None], axis=1)


def among_largest(logits: mx.array, k: mx.array) -> mx.array:
    """Which of ``logits`` [..., V], none above 0, are not below the ``k``-th largest; [..., 1]."""
    bits = mx.abs(logits).view(mx.int32)
    last = _largest(lambda t: (bits < t).sum(axis=-1, keepdims=True) < k, math.inf, bits[..., :1])
    return bits <= last


def among_likeliest(logits: mx.array, p: mx.array) -> mx.array:
    """Which of ``logits`` [..., V], the largest 0, it takes to reach the probability ``p`` [..., 1]."""
    vocabulary = logits.shape[-1]
    masses = mx.exp(logits).reshape(*logits.shape[:-1], math.gcd(vocabulary, 128), -1)
    bits = masses.view(mx.int32)

    def total(x: mx.array) -> mx.array:
        return x.sum(axis=-2, keepdims=True).sum(axis=-1, keepdims=True)

    goal = p[..., None] * total(masses)
    last = _largest(lambda t: total(masses * (bits >= t)) >= goal, 1.0, bits[..., :1, :1])
    return (bits >= last).reshape(logits.shape) | (p >= 1)  # rounding of the sum must not drop any then


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


def seeds_at(seeds: mx.array, place: mx.array) -> mx.array:
    """Random numbers' seeds [B, N, 2] for places [B, N] of B texts, derived from the texts' ``seeds`` [B, 2].

    A place has its own randomness whatever is drafted and whoever shares the batch, so a seed always
    gives the same text. Nodes at one depth share it, and only one of them can be on the accepted path.
    """
    first = mx.broadcast_to(seeds[:, :1], place.shape)
    return mx.stack([first, seeds[:, 1:] + place.astype(mx.uint32)], axis=-1)
