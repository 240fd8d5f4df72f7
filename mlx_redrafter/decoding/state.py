"""What decoding knows of B texts, how much a step drafts, and what a step gives."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from . import lookup
from .layers import (
    Layers,
    commit,
    fit_rows,
    join_rows,
    take_rows,
    with_room,
)


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
        """L, levels below the root that a tree of this size can have."""
        return min(max(self.length, self.lookup), self.size - 1)

    @property
    def has_one_branch(self) -> bool:
        """Whether there is nothing to choose from: a single beam, or the copy alone."""
        return self.width + bool(self.lookup) == 1

    @property
    def is_chain(self) -> bool:
        """Whether no tree of this shape branches, so that its accepted nodes are its first ones."""
        return self.size <= 2 or self.has_one_branch

    @property
    def chain(self) -> "DraftShape":
        """The shape if its trees are chains, or else one of the likeliest beam (or copies) alone."""
        if self.is_chain:
            return self
        if self.width:
            return DraftShape(1, min(self.length, self.depth))
        return DraftShape(0, 0, None, self.depth)

    @property
    def room(self) -> int:
        """Rows after the text that a step needs for its nodes, and for the tokens that it may emit."""
        return max(self.size, self.depth + 2)


PLAIN = DraftShape(0, 0)


PER_TEXT = ("token", "context", "rows", "record", "seeds")  # of a state, arrays [B, ...]


@dataclass
class State:
    """What decoding knows of B texts: once committed, the layers hold every token of each but the last."""

    token: mx.array  # [B] the last token
    context: mx.array  # [B, F] what the drafter reads of the target: the hidden state that gave `token`
    rows: mx.array  # [B] tokens that the layers hold
    layers: Layers
    history: mx.array  # [B, C] the text, `token` at the place `rows`; negative where it is not known
    record: mx.array  # [B, 4, 2] how often copies were right (lookup.py)
    seeds: mx.array  # [B, 2] of each text's random numbers; those of a place in it derive from them
    # What sampling.py and penalties.py need to know of the texts. ``take`` and ``join`` leave it out.
    sampling: dict[str, mx.array] = field(default_factory=dict)

    @property
    def capacity(self) -> int:
        """C, tokens that there is room for."""
        return int(self.history.shape[1])


@dataclass
class Output:
    """What a step emitted. The first ``count`` of ``tokens`` are valid, all but the last drafted."""

    tokens: mx.array  # [B, L+1]
    count: mx.array  # [B]
    ranks: mx.array  # [B, L+1] at 1...L the beam that drafted the token of the depth; -1: copied
    logits: mx.array  # [B, L+1, V] the target's logits from which ``tokens`` were picked
    drafted: mx.array  # [B, N] all tokens of the tree
    verified: mx.array  # [B, N, V] all of the target's logits, the end of the heavy part of the step


def begin(known: Sequence[int], rows: int, layers: Layers, context: mx.array, seeds: mx.array) -> State:
    """The state of one text.

    Args:
        known: its last token ids, one or more; what came before them is unknown.
        rows: tokens of it that the layers hold: all but the last.
        layers: with room for at least one more row, where they keep rows.
        context: [1, F]; zeros if what gave the last token is not known, and then the first step had better be
            plain.
        seeds: [2] of the text's random numbers.
    """
    history = np.full((1, max(layers.capacity, rows + 1)), -1, np.int32)
    history[0, rows + 1 - len(known) : rows + 1] = known
    return State(
        mx.array([known[-1]], mx.int32),
        context,
        mx.array([rows], mx.int32),
        layers,
        mx.array(history),
        lookup.first_record(1),
        seeds[None],
    )


def with_capacity(state: State, capacity: int, room: int = 0) -> State:
    """The committed state with room for exactly ``capacity`` tokens, in place of the given one.

    Args:
        room: of rings, at least.
    """
    layers = state.layers
    if room > layers.room:
        layers = with_room(layers, capacity, room, state.rows)
    if capacity == state.capacity:
        return replace(state, layers=commit(layers))
    return replace(state, layers=fit_rows(layers, capacity), history=_fitted(state.history, capacity))


def take(state: State, texts: Sequence[int], capacity: int) -> State:
    """The committed state of some of the texts, by number (one may be repeated), in place of the given one.

    Args:
        capacity: what the texts need at least; room beyond it is given up.
    """
    index = mx.array(list(texts), mx.int32)
    layers = take_rows(state.layers, index, capacity)
    per_text: dict[str, Any] = {name: getattr(state, name)[index] for name in PER_TEXT}
    return State(**per_text, layers=layers, history=_fitted(state.history, capacity)[index])


def join(states: Sequence[State], capacity: int) -> State:
    """One committed state of all texts, in place of the given ones."""
    room = max(state.layers.room for state in states)
    fitted = [with_capacity(state, capacity, room) for state in states]
    layers = join_rows([state.layers for state in fitted])
    names = (*PER_TEXT, "history")
    per_text: dict[str, Any] = {
        name: mx.concatenate([getattr(state, name) for state in fitted]) for name in names
    }
    return State(**per_text, layers=layers)


def _fitted(history: mx.array, capacity: int) -> mx.array:
    missing = max(capacity - history.shape[1], 0)
    return mx.pad(history[:, :capacity], [(0, 0), (0, missing)], constant_values=-1)
