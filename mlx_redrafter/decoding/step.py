"""One step of speculative decoding: the whole algorithm.

    state ──► commit ──► propose ──► verify ──► conclude ──► state, output
              the last   a tree of   one        follow the
              step's     drafted     forward    target's own
              path       tokens      pass       picks down it

Letters, the same in every file: B texts · N nodes of a tree · L depths of it · W beams · C capacity in rows ·
T rows of text · H model width · F context width · V vocabulary · Vd draft vocabulary · Hq, Hkv heads ·
Dh head size. A node's *row* is its keys and values; ``seeds`` are random numbers', keys are attention's;
*noise* is what sampling adds to logits before it picks the largest.
A drafter's *memory* is one more layer of rows: what it noted of every token that the target has read.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx

from . import lookup
from .accept import accept
from .beam import Proposer, draft
from .chance import of_nodes, seeds_at
from .layers import Layers, Rows, View, commit, leave_path, write_tokens
from .lookup import Found
from .sampling import draw
from .state import DraftShape, Output, State
from .tree import Tree, build_chain, build_tree, from_beam


def step(
    target: "Verifier", drafter: Proposer | None, pick: "Pick", shape: DraftShape, state: State, view: View
) -> tuple[State, Output]:
    """Draft, verify, accept; commit comes first, for the step before (``layers.py`` says why).

    Args:
        target: the language model.
        drafter: may be None if the shape has no beams.
        pick: how the target picks tokens.
        shape: how much is drafted.
        state: with room for ``shape.room`` rows after the text; ``shape.size`` where a window's are kept.
        view: what attention is shown of the buffers.
    """
    state, proposed, seen = look_ahead(target, drafter, shape, state, view)
    return conclude(pick, shape, state, proposed, seen)


def look_ahead(
    target: "Verifier", drafter: Proposer | None, shape: DraftShape, state: State, view: View
) -> tuple[State, "Proposed", "Verified"]:
    """Commit, propose, verify, which is all that takes the device long: the state with the tree's rows
    written, what was proposed, and what the target says of it."""
    assert state.layers.has_room(shape.size)
    state = replace(state, layers=commit(state.layers))
    proposed = propose(target, drafter, shape, state, view)
    if target.leader is not None and shape.size > 1:
        proposed = replace(proposed, tree=target.leader.share_tree(proposed.tree, shape.depth))
    seen = target.verify(proposed.tree, state.layers, state.rows, view)
    return replace(state, layers=replace(state.layers, rows=seen.rows)), proposed, seen


def propose(
    target: "Verifier", drafter: Proposer | None, shape: DraftShape, state: State, view: View
) -> "Proposed":
    """The tree of the likeliest candidates: the drafter's beams, and what the text itself suggests."""
    if shape.size == 1:
        return Proposed(build_chain(state.token, None, 1))
    drafted, noise = None, None
    length = min(shape.length, shape.depth)
    # What followed the last occurrence of the text's end: a branch of its own, or the beams' to copy.
    found = lookup.find(state.history, state.rows, shape.depth)
    if shape.width:
        assert drafter is not None
        memory = None
        if state.layers.memory:
            entries = state.layers.rows[-1]
            memory = drafter.look_back(entries, state.rows, view.columns, state.history, target.embed)
        kept = None
        if "temperature" in state.sampling:  # how tokens will be picked is known, and drafts count on it
            from .drawing import noise_for, rough_filter

            noise = noise_for(seeds_ahead(state, shape.depth), target.vocabulary, state.sampling)
            kept = rough_filter(state.sampling)
        copy = found.tokens[:, :length], found.match
        beam = draft(
            drafter, target.embed, state.token, state.context, shape.width, length, memory, copy, noise, kept
        )
        drafted = from_beam(beam)
    if shape.lookup:
        found = Found(found.tokens[:, : min(shape.lookup, shape.depth)], found.match)
        scores = lookup.scores(found, state.record)
        drafted = lookup.merge(drafted, found, scores) if drafted else lookup.alone(found, scores)
    assert drafted is not None
    learned = found if shape.lookup else None
    if shape.has_one_branch:
        return Proposed(build_chain(state.token, drafted, shape.size), learned, noise)
    return Proposed(build_tree(state.token, drafted, shape.size, shape.depth), learned, noise)


def conclude(
    pick: "Pick", shape: DraftShape, state: State, proposed: "Proposed", seen: "Verified"
) -> tuple[State, Output]:
    """Follow the target's picks down the tree; the state after the accepted path."""
    tree = proposed.tree
    all_logits, picks = pick(tree, state, seen.logits, proposed.noise)  # [B, N, V], [B, N]
    accepted = accept(tree, picks, shape.depth)
    end = accepted.count[:, None] - 1  # [B, 1] place of the last emitted token on the path
    last = mx.take_along_axis(accepted.path, end, axis=1)  # [B, 1] the node it was picked at
    states = seen.states(last[:, 0])
    layers = replace(state.layers, rows=seen.rows, path=[], path_start=None, states=states)
    nodes = seen.nodes
    if tree.is_chain:  # its accepted rows are where they belong already, except those of the memory
        nodes = [*[[]] * (len(nodes) - 1), nodes[-1]] if layers.memory else []
    if nodes:
        layers = leave_path(layers, nodes, accepted.path, state.rows)

    token = mx.take_along_axis(accepted.tokens, end, axis=1)[:, 0]  # [B]
    context = of_nodes(seen.context, last)[:, 0]  # [B, F]
    logits = of_nodes(all_logits, accepted.path)  # [B, L+1, V]
    history = write_tokens(state.history, accepted.tokens, state.rows + 1)
    record = state.record
    if proposed.found is not None:
        record = lookup.learn(record, proposed.found, accepted.tokens, accepted.count)
    ranks = mx.take_along_axis(tree.ranks, accepted.path, axis=1)
    after = replace(state, token=token, context=context, rows=state.rows + accepted.count)
    after = replace(after, layers=layers, history=history, record=record)
    return after, Output(accepted.tokens, accepted.count, ranks, logits, tree.tokens, seen.logits)


def pick(
    tree: Tree, state: State, logits: mx.array, noise: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """The usual ``Pick``: penalties and filters by each text's settings, random numbers by its seeds."""
    if state.sampling.keys() & {"bias", "ages"}:
        from .penalties import penalise  # most texts have none

        logits = penalise(logits, tree, state.history, state.rows, state.sampling)
    depths = None if tree.is_chain else tree.depths
    seeds, partly = seeds_ahead(state, tree.depth), tree.tokens.shape[1] > 1
    return logits, draw(logits, seeds, state.sampling, depths, noise, partly)


def seeds_ahead(state: State, depth: int) -> mx.array:
    """Random numbers' seeds [B, L+1, 2] of the tokens after nodes at the depths 0...L."""
    return seeds_at(state.seeds, state.rows[:, None] + mx.arange(depth + 1))


# Logits [B, N, V] at a tree's nodes -> the logits that count (after penalties), and a token [B, N] for each;
# -1 for one, but never the root's, that takes too long to find: its node is not accepted.
# Given last is the noise [B, L+1, V] of ``Proposed``, where drafts counted on it.
Pick = Callable[[Tree, State, mx.array, mx.array | None], tuple[mx.array, mx.array]]


@dataclass
class Proposed:
    """What will be verified."""

    tree: Tree
    found: Found | None = None  # what the lookup gave
    noise: mx.array | None = None  # [B, L+1, V] what a depth's logits are drawn with, if that was of use


@dataclass
class Verified:
    """What the target says of a tree's N nodes, and the buffers with the nodes' rows written."""

    logits: mx.array  # [B, N, V]
    context: mx.array  # [B, N, F]
    rows: list[Rows]  # per layer [B, Hkv, C, ...]; a memory's are not written
    nodes: list[Rows]  # per layer [B, Hkv, N, ...]
    # The recurrent layers' states after a node [B] of each text and those that it comes after.
    states: Callable[[mx.array], list[list[mx.array]]] = lambda last: []


class Verifier(Protocol):
    """The language model, as the step sees it."""

    vocabulary: int  # V, at least that of drafts
    leader: Any  # where several machines verify, makes all trees the first one's; else None

    def embed(self, tokens: mx.array) -> mx.array:
        """[...] -> [..., H]."""
        ...

    def verify(self, tree: Tree, layers: Layers, start: mx.array, view: View) -> Verified:
        """One forward pass over the tree, whose root comes after ``start`` [B] committed rows."""
        ...
