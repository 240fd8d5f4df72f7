"""One step of speculative decoding: the whole algorithm."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from . import lookup
from .accept import accept
from .beam import Drafter, draft
from .cache import Cache, View, commit, leave_path, write_tokens
from .lookup import Found
from .sampling import keys_at
from .tree import Tree, build_chain, build_tree, from_beam

Pick = Callable[[mx.array, mx.array], mx.array]  # logits [B, N, V], random keys [B, N, 2] -> tokens [B, N]


@dataclass(frozen=True)
class DraftShape:
    """How much is drafted: ``width`` beams of ``length`` tokens and ``lookup`` tokens copied from the text.

    The ``nodes`` likeliest of them are verified, the root (the last token emitted) included; None verifies
    all, 1 + width * length + lookup. ``DraftShape(0, 0)`` drafts nothing: plain decoding.

    Raises:
        ValueError: a value out of range.
    """

    width: int
    length: int
    nodes: int | None = None
    lookup: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("beam width", self.width, 0),
            ("beam length", self.length, 0),
            ("lookup", self.lookup, 0),
        ):
            if value < least:
                raise ValueError(f"{name} {value} is not usable: give {least} or more.")
        if (self.width == 0) != (self.length == 0):
            raise ValueError(
                f"beam width {self.width} does not fit beam length {self.length}: give 1 or more for both, "
                "or 0 for both (no drafter)."
            )
        most = self._most
        least = min(2, most)
        if self.nodes is not None and not least <= self.nodes <= most:
            raise ValueError(
                f"{self.nodes} tree nodes do not fit beam width {self.width}, length {self.length} and "
                f"lookup {self.lookup}: give {least} to {most}."
            )

    @property
    def _most(self) -> int:
        return 1 + self.width * self.length + self.lookup

    @property
    def size(self) -> int:
        """N, tree nodes verified, the root included."""
        return self.nodes or self._most

    @property
    def depth(self) -> int:
        """D, levels below the root that a tree of this size can have."""
        return min(max(self.length, self.lookup), self.size - 1)

    @property
    def is_chain(self) -> bool:
        """Whether no tree of this shape branches, so that its accepted nodes are its first ones."""
        return self.size == 1 or self.width == 0 or (self.width == 1 and self.lookup == 0)


@dataclass
class State:
    """What decoding knows: once committed, the cache holds every token so far except the last."""

    token: mx.array  # [B] the last token
    context: mx.array  # [B, F] what the drafter reads of the target: the hidden state that gave `token`
    length: mx.array  # [B] tokens in the cache
    cache: Cache
    history: mx.array  # [B, C] the text, `token` at the place `length`; negative where it is not known
    record: mx.array  # [B, 4, 2] how often lookups were right (lookup.py)
    key: mx.array  # [2] for random numbers; those of a place in the text derive from it


def begin(
    token: mx.array,
    context: mx.array,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    key: mx.array,
) -> State:
    """The state behind B prompts.

    Args:
        token: [B] the first token after each prompt.
        context: [B, F] what the drafter reads of the target.
        cache: holds ``lengths`` rows of each text.
        prompts: token ids, the last ones of each text; what came before them is not known.
        lengths: [B] tokens of each text, those that are not known included.
        key: for random numbers.
    """
    history = np.full((len(prompts), cache.capacity), -1, np.int32)
    for row, prompt, length in zip(history, prompts, lengths, strict=True):
        row[length - len(prompt) : length] = prompt
    place = mx.array(list(lengths), mx.int32)
    room = mx.pad(mx.array(history), [(0, 0), (0, 1)], constant_values=-1)
    written = write_tokens(room, token[:, None], place)[:, : cache.capacity]
    return State(token, context, place, cache, written, lookup.first_record(len(prompts)), key)


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

    weights: list[mx.array]

    def with_weights(self, weights: list[mx.array]) -> "Target":
        """The same model with other arrays in the places of its ``weights``."""
        ...

    def embed(self, tokens: mx.array) -> mx.array:
        """[...] -> [..., H]."""
        ...

    def verify(self, tree: Tree, cache: Cache, length: mx.array, view: View | None = None) -> Verified:
        """One forward pass over the tree, behind ``length`` [B] committed rows."""
        ...


@dataclass
class Output:
    """What a step emitted. The first ``count`` of ``tokens`` are valid, all but the last drafted."""

    tokens: mx.array  # [B, D+1]
    count: mx.array  # [B]
    ranks: mx.array  # [B, D+1] at 1...D the beam that drafted the token of the depth; -1: copied
    logits: mx.array  # [B, D+1, V] the target's logits from which ``tokens`` were picked
    verified: mx.array  # [B, N, V] all of the target's logits, the end of the heavy part of the step


@dataclass
class Proposed:
    """What is to be verified."""

    tree: Tree
    found: Found | None  # what the lookup gave


def step(
    target: Target,
    drafter: Drafter | None,
    pick: Pick,
    shape: DraftShape,
    state: State,
    view: View | None = None,
) -> tuple[State, Output]:
    """Draft, verify, accept; commit comes first, for the step before (``cache.py`` says why).

    Args:
        target: the language model.
        drafter: may be None if the shape has no beams.
        pick: how the target picks a token.
        shape: how much is drafted.
        state: with room for N rows (and D + 2 tokens of history) behind the text.
        view: what attention is shown of the buffers; None: all.
    """
    cache = commit(state.cache)
    proposed = propose(target, drafter, shape, state)
    seen = target.verify(proposed.tree, cache, state.length, view)
    return conclude(pick, shape, state, proposed, seen)


def propose(target: Target, drafter: Drafter | None, shape: DraftShape, state: State) -> Proposed:
    """The tree of the likeliest candidates: the drafter's beams, and what the text itself suggests."""
    if shape.size == 1:
        return Proposed(build_chain(state.token, None, 1), None)
    drafted, found = None, None
    if shape.width:
        assert drafter is not None
        length = min(shape.length, shape.depth)
        drafted = from_beam(draft(drafter, target.embed, state.token, state.context, shape.width, length))
    if shape.lookup:
        found = lookup.find(state.history, state.length, min(shape.lookup, shape.depth))
        scores = lookup.scores(found, state.record)
        drafted = lookup.merge(drafted, found, scores) if drafted else lookup.alone(found, scores)
    assert drafted is not None
    if shape.is_chain:
        return Proposed(build_chain(state.token, drafted, shape.size), found)
    return Proposed(build_tree(state.token, drafted, shape.size, shape.depth), found)


def conclude(
    pick: Pick, shape: DraftShape, state: State, proposed: Proposed, seen: Verified
) -> tuple[State, Output]:
    """Follow the target's picks down the tree; the state behind the accepted path."""
    tree = proposed.tree
    keys = keys_at(state.key, state.length[:, None] + tree.depths)
    accepted = accept(tree, pick(seen.logits, keys), shape.depth)
    cache = Cache(seen.keys, seen.values)
    if not shape.is_chain:
        cache = leave_path(cache, seen.node_keys, seen.node_values, accepted.path, state.length)

    end = accepted.count[:, None] - 1  # [B, 1] place of the last emitted token on the path
    last = mx.take_along_axis(accepted.path, end, axis=1)  # [B, 1] the node it was picked at
    token = mx.take_along_axis(accepted.tokens, end, axis=1)[:, 0]  # [B]
    context = mx.take_along_axis(seen.context, last[..., None], axis=1)[:, 0]  # [B, F]
    logits = mx.take_along_axis(seen.logits, accepted.path[..., None], axis=1)  # [B, D+1, V]
    history = write_tokens(state.history, accepted.tokens, state.length + 1)
    record = state.record
    if proposed.found is not None:
        record = lookup.learn(record, proposed.found, accepted.tokens, accepted.count)
    ranks = mx.take_along_axis(tree.ranks, accepted.path, axis=1)
    return (
        State(token, context, state.length + accepted.count, cache, history, record, state.key),
        Output(accepted.tokens, accepted.count, ranks, logits, seen.logits),
    )
