"""The drafted beams as one prefix tree, the shape in which the target verifies them.

Beam search names each survivor's parent, so the survivors of all depths form a tree with no
duplicates. Example (width 2, length 2, all nodes kept), after the token "the":

    depth 1: cat, dog            node  0 the   1 cat  2 dog  3 sat  4 ran
    depth 2: cat sat, cat ran    parent 0      0      0      1      1
                                 depth  0      1      1      2      2
    ancestors of node 3: 0, 1, 3
"""

from dataclasses import dataclass, replace

import mlx.core as mx

from .beam import Beam


@dataclass
class Candidates:
    """M nodes to choose from. A parent comes before its children and never scores below them."""

    tokens: mx.array  # [B, M] the target's token ids
    parents: mx.array  # [B, M] the parent's place among the candidates; -1: the last token emitted
    scores: mx.array  # [B, M] log-probability of the path from the root
    ranks: list[int]  # [M] which beam of its depth it is, the likeliest 0; -1: copied from the text


@dataclass
class Tree:
    """N nodes; node 0 is the last token emitted, parents come before their children."""

    tokens: mx.array  # [B, N]
    parents: mx.array  # [B, N], 0 for the root itself
    depths: mx.array  # [B, N], 0 for the root
    ancestors: mx.array  # [B, N, N] bool: column is the row's node itself or an ancestor of it
    ranks: mx.array  # [B, N] as in ``Candidates``, 0 for the root
    depth: int  # known in advance: no node is deeper
    is_chain: bool = False  # known in advance: each node's parent is the one before it


def from_beam(beam: Beam) -> Candidates:
    """The survivors of all depths, M = L * W."""
    batch, length, width = beam.tokens.shape
    place = mx.arange(length * width)
    depth_before = (place // width - 1) * width  # where the depth before starts; -W for the first
    parents = beam.parents.reshape(batch, length * width) + depth_before
    return Candidates(
        beam.tokens.reshape(batch, length * width),
        mx.maximum(parents, -1),
        beam.scores.reshape(batch, length * width),
        [*range(width)] * length,
    )


def build_tree(token: mx.array, candidates: Candidates, nodes: int, depth: int) -> Tree:
    """The root and the ``nodes - 1`` likeliest candidates.

    A child never scores above its parent and ties go to the first place, so whatever is kept, its
    ancestors are kept too.

    Args:
        token: [B], the last token emitted.
        candidates: M nodes to choose from.
        nodes: N, between 1 and 1 + M.
        depth: levels below the root that the tree can have.
    """
    batch = token.shape[0]
    kept = _likeliest(candidates.scores, nodes - 1)  # [B, N-1], ascending
    parents = mx.take_along_axis(candidates.parents, kept, axis=1)  # [B, N-1]
    before = (kept[:, None] <= parents[..., None]).sum(axis=-1)  # [B, N-1]: node number of the parent
    parents = mx.concatenate([mx.zeros((batch, 1), mx.int32), before.astype(mx.int32)], axis=1)
    tokens = mx.take_along_axis(candidates.tokens, kept, axis=1)
    tokens = mx.concatenate([token[:, None].astype(tokens.dtype), tokens], axis=1)  # [B, N]
    ranks = mx.array([0, *candidates.ranks], mx.int32)[mx.pad(kept + 1, [(0, 0), (1, 0)])]  # [B, N]
    return replace(make_tree(tokens, parents, depth, ranks), is_chain=nodes <= 2)


def build_chain(token: mx.array, candidates: Candidates | None, nodes: int) -> Tree:
    """The root [B] and the first ``nodes - 1`` candidates, each of which continues the one before."""
    tokens, ranks = token[:, None], [0]
    if candidates is not None:
        drafted = candidates.tokens[:, : nodes - 1]
        tokens = mx.concatenate([tokens.astype(drafted.dtype), drafted], axis=1)  # [B, N]
        ranks += candidates.ranks[: nodes - 1]
    shape = (token.shape[0], nodes)
    place = mx.arange(nodes, dtype=mx.int32)
    ancestors = mx.broadcast_to(place <= place[:, None], (*shape, nodes))
    parents = mx.broadcast_to(mx.maximum(place - 1, 0), shape)
    depths = mx.broadcast_to(place, shape)
    of_all = mx.broadcast_to(mx.array(ranks), shape)
    return Tree(tokens, parents, depths, ancestors, of_all, nodes - 1, is_chain=True)


def make_tree(tokens: mx.array, parents: mx.array, depth: int, ranks: mx.array | None = None) -> Tree:
    """A tree of at most ``depth`` levels below the root from its nodes' tokens and parents [B, N]."""
    ancestors = ancestor_mask(parents, depth)
    depths = ancestors.sum(axis=-1).astype(mx.int32) - 1
    ranks = mx.zeros_like(parents) if ranks is None else ranks
    return Tree(tokens, parents, depths, ancestors, ranks, min(depth, tokens.shape[1] - 1))


def _likeliest(scores: mx.array, count: int) -> mx.array:
    """Places [B, count] of the largest of ``scores`` [B, M], in ascending order; ties: first ones."""
    place = mx.arange(scores.shape[1])
    other, own = scores[:, None, :], scores[:, :, None]
    ahead = (other > own) | ((other == own) & (place < place[:, None]))  # [B, M, M]
    chosen = ahead.sum(axis=-1) < count  # [B, M], count of them true
    return mx.sort(mx.where(chosen, place, scores.shape[1]), axis=1)[:, :count].astype(mx.int32)


def ancestor_mask(parents: mx.array, depth: int) -> mx.array:
    """[B, N] parents -> [B, N, N] bool, for a tree of at most ``depth`` levels below the root."""
    node = mx.arange(parents.shape[1])
    mask = node[None, :, None] == node[None, None, :]  # [1, N, N]: each node itself
    above = mx.broadcast_to(node, parents.shape)  # [B, N]
    for _ in range(depth):
        above = mx.take_along_axis(parents, above, axis=1)
        mask = mask | (above[..., None] == node)
    return mask
