"""How tokens are drawn at a temperature: random numbers are added to logits, and the largest is picked.

Greedy texts do not need this file.
"""

from collections.abc import Callable, Mapping

import mlx.core as mx

from .chance import noise_at, of_nodes

FILTERS = {"top_p", "min_p", "min_tokens", "xtc_probability", "top_k", "few"}


def drawn(
    logits: mx.array,
    seeds: mx.array,
    filters: Mapping[str, mx.array],
    depths: mx.array | None,
    noise: mx.array | None,
    partly: bool,
) -> mx.array:
    """As ``sampling.draw``, of texts that are not all greedy."""
    kept, count = logits.astype(mx.float32), logits.shape[1]
    if noise is None or noise.shape[-1] != logits.shape[-1]:
        noise = noise_for(seeds, logits.shape[-1], filters)
    noise = of_nodes(noise, depths)[:, :count]  # [B, N, V]; a chain may end early
    sure = []
    if not has_no_filter(filters):
        from .filters import drawn_if_sure, filtered  # most texts have none

        kept = kept - kept.max(axis=-1, keepdims=True)
        if partly and "top_p" in filters and "xtc_probability" not in filters:
            sure, count = [drawn_if_sure(kept[:, 1:], noise[:, 1:], filters)], 1
        kept = filtered(kept[:, :count], seeds, filters, depths)
    first = mx.argmax(kept + noise[:, :count], axis=-1).astype(mx.int32)
    return mx.concatenate([first, *sure], axis=1) if sure else first


def noise_for(seeds: mx.array, vocabulary: int, filters: Mapping[str, mx.array]) -> mx.array:
    """What is added to logits [B, ..., V] before the largest is picked, for ``seeds`` [B, ..., 2].

    Where others divide the logits by the temperature, the noise is multiplied by it: greedy texts have none.
    """
    temperature = filters["temperature"][:, None, None]  # [B, 1, 1]
    return mx.where(temperature > 0, temperature * noise_at(seeds, vocabulary), 0.0)


def has_no_filter(filters: Mapping[str, mx.array]) -> bool:
    """Whether tokens are drawn by temperature alone."""
    return filters.keys().isdisjoint(FILTERS)


def rough_filter(filters: Mapping[str, mx.array]) -> Callable[[mx.array], mx.array] | None:
    """What the filters would keep of a drafter's logits [B, W, V_draft], if there are any."""
    if has_no_filter(filters):
        return None
    from .filters import roughly_filtered

    return lambda logits: roughly_filtered(logits, filters)
