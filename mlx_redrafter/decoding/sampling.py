"""How the target picks tokens: one implementation for plain and for speculative decoding.

Each text has its own settings. A step is given them as arrays with an entry for each text, and only those
that some text uses; a text that does not use one has a neutral value there, which changes nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from .topk import FEW

CONTEXT = 20  # how many tokens a penalty looks back, mlx-lm's default
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
    def penalises(self) -> bool:
        """Whether it changes logits, by a bias or a penalty."""
        penalties = self.repetition_penalty not in (0, 1), self.presence_penalty, self.frequency_penalty
        return bool(self.logit_bias) or any(penalties)

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
    partly: bool = False,
) -> mx.array:
    """A token for every node of every text: [B, N] int32.

    Args:
        logits: [B, N, V].
        seeds: [B, N, 2] of each node's random numbers; [B, L+1, 2] of each depth's with ``depths``.
        filters: from ``filter_settings``.
        depths: [B, N] of the nodes. V random numbers take long to make, and a depth needs them once.
        noise: [B, L+1, V] of ``noise_for``, if it is known already.
        partly: whether -1 may stand for a token, of any node but the first, that takes long to find.
    """
    if "temperature" not in filters:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    from .drawing import drawn

    return drawn(logits, seeds, filters, depths, noise, partly)
