"""One step of speculative decoding: the whole algorithm."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from .accept import accept
from .beam import Drafter, draft
from .cache import Cache, commit, leave_path
from .tree import Tree, build_tree

Pick = Callable[[mx.array, mx.array], mx.array]  # logits [..., V], random key -> tokens [...]


@dataclass(frozen=True)
class DraftShape:
    """How much is drafted: ``width`` beams of ``length`` tokens, ``nodes`` of them verified.

    ``nodes`` counts the root, the last token emitted; None verifies all, 1 + width * length.

    Raises:
        ValueError: a value out of range.
    """

    width: int
    length: int
    nodes: int | None = None

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"beam width {self.width} is not usable: give 1 or more.")
        if self.length < 1:
            raise ValueError(f"beam length {self.length} is not usable: give 1 or more.")
        most = 1 + self.width * self.length
        if self.nodes is not None and not 2 <= self.nodes <= most:
            raise ValueError(
                f"{self.nodes} tree nodes do not fit beam width {self.width} and length {self.length}: "
                f"give 2 to {most}."
            )

    @property
    def size(self) -> int:
        """N, tree nodes verified, the root included."""
        return self.nodes or 1 + self.width * self.length

    @property
    def depth(self) -> int:
        """D, levels below the root that a tree of this size can have."""
        return min(self.length, self.size - 1)


@dataclass
class State:
    """What decoding knows: once committed, the cache holds every token so far except the last."""

    token: mx.array  # [B] the last token
    context: mx.array  # [B, F] what the drafter reads of the target: the hidden state that gave `token`
    length: mx.array  # [B] tokens in the cache
    cache: Cache
    key: mx.array  # for random numbers


@dataclass
class Verified:
    """What the target says of a tree's N nodes, and the buffers with the nodes' rows written."""

    logits: mx.array  # [B, N, V]
    context: mx.array  # [B, N, F]
    keys: list[mx.array]  # per layer [B, Hkv, C, D]
    values: list[mx.array]
    node_keys: Sequence[mx.array]  # per layer [B, Hkv, N, D]
    node_values: Sequence[mx.array]


class Target(Protocol):
    """The language model, as the step sees it."""

    def embed(self, tokens: mx.array) -> mx.array:
        """[...] -> [..., H]."""
        ...

    def verify(self, tree: Tree, cache: Cache, length: mx.array) -> Verified:
        """One forward pass over the tree, behind ``length`` [B] committed rows."""
        ...


@dataclass
class Output:
    """What a step emitted. The first ``count`` of ``tokens`` are valid, all but the last drafted."""

    tokens: mx.array  # [B, D+1]
    count: mx.array  # [B]
    logits: mx.array  # [B, D+1, V] the target's logits from which ``tokens`` were picked


def step(
    target: Target, drafter: Drafter, pick: Pick, shape: DraftShape, state: State
) -> tuple[State, Output]:
    """Draft, verify, accept; commit comes first, for the step before (``cache.py`` says why)."""
    key, sample_key = mx.random.split(state.key)
    cache = commit(state.cache)
    beam = draft(drafter, target.embed, state.token, state.context, shape.width, shape.depth)
    tree = build_tree(state.token, beam, shape.size)
    seen = target.verify(tree, cache, state.length)
    accepted = accept(tree, pick(seen.logits, sample_key), shape.depth)
    cache = leave_path(seen.keys, seen.values, seen.node_keys, seen.node_values, accepted.path, state.length)

    end = accepted.count[:, None] - 1  # [B, 1] place of the last emitted token on the path
    last = mx.take_along_axis(accepted.path, end, axis=1)  # [B, 1] the node it was picked at
    token = mx.take_along_axis(accepted.tokens, end, axis=1)[:, 0]  # [B]
    context = mx.take_along_axis(seen.context, last[..., None], axis=1)[:, 0]  # [B, F]
    logits = mx.take_along_axis(seen.logits, accepted.path[..., None], axis=1)  # [B, D+1, V]
    return (
        State(token, context, state.length + accepted.count, cache, key),
        Output(accepted.tokens, accepted.count, logits),
    )
