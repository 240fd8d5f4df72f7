"""Random numbers that belong to the places of a text, so they are known before a place is reached."""

from collections.abc import Callable

import mlx.core as mx


def seeds_at(seeds: mx.array, place: mx.array) -> mx.array:
    """Random numbers' seeds [B, N, 2] for places [B, N] of B texts, derived from the texts' ``seeds`` [B, 2].

    A place has its own randomness whatever is drafted and whoever shares the batch, so a seed always
    gives the same text. Nodes at one depth share it, and only one of them can be on the accepted path.
    """
    first = mx.broadcast_to(seeds[:, :1], place.shape)
    return mx.stack([first, seeds[:, 1:] + place.astype(mx.uint32)], axis=-1)


def noise_at(seeds: mx.array, vocabulary: int) -> mx.array:
    """Gumbel's [B, ..., V], which at temperature 1 logits are given before the largest is picked."""
    return at_each(lambda seed: mx.random.gumbel((vocabulary,), key=seed), seeds)


def at_each(random: Callable[[mx.array], mx.array], seeds: mx.array) -> mx.array:
    """Random numbers [B, N, ...] for seeds [B, N, 2], each as if there were no others."""
    numbers = mx.vmap(random)(seeds.reshape(-1, 2))
    return numbers.reshape(*seeds.shape[:-1], -1)


def of_nodes(numbers: mx.array, nodes: mx.array | None) -> mx.array:
    """Numbers [B, M, ...] at places [B, M] of [B, N, ...], those of a place copied as one; None: all."""
    if nodes is None:
        return numbers
    first = numbers.shape[1] * mx.arange(numbers.shape[0])[:, None]
    return numbers.reshape(-1, *numbers.shape[2:])[first + nodes]
