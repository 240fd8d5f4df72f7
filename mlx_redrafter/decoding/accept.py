"""Which drafted nodes the target would have said itself."""

from dataclasses import dataclass

import mlx.core as mx

from .tree import Tree


@dataclass
class Accepted:
    """The accepted path from the root, and what is emitted along it."""

    path: mx.array  # [B, L+1] node at each depth; 0 beyond the last accepted node
    count: mx.array  # [B] nodes on the path (the root included) = tokens emitted
    tokens: mx.array  # [B, L+1] the target's pick at each node of the path; ``count`` of them are valid


def accept(tree: Tree, picks: mx.array, depth: int) -> Accepted:
    """Follow the target's own picks down the tree.

    A node is accepted if its token is what the target picked at its parent, and its parent is
    accepted. The picks are the target's own samples (or argmax), so what is emitted has exactly the
    target's distribution, whatever was drafted.

    Args:
        tree: N drafted nodes, at most ``depth`` levels below the root.
        picks: [B, N], the target's pick after each node; -1 if it is not known, so that no path goes there.
    """
    if depth == 0:  # plain decoding, which must cost no more than it does elsewhere
        root = mx.zeros(picks.shape, mx.int32)
        return Accepted(root, mx.ones((picks.shape[0],), mx.int32), picks)
    picks = picks.astype(tree.tokens.dtype)
    match = mx.take_along_axis(picks, tree.parents, axis=1) == tree.tokens  # [B, N]
    match = (match & (picks >= 0)) | (tree.depths == 0)
    accepted = (match[:, None, :] | ~tree.ancestors).all(axis=-1)  # [B, N]: every ancestor matches
    level = mx.arange(depth + 1)[:, None]  # [L+1, 1]
    path = mx.argmax(accepted[:, None] & (tree.depths[:, None] == level), axis=-1)  # [B, L+1]
    tokens = mx.take_along_axis(picks, path, axis=1)
    return Accepted(path.astype(mx.int32), accepted.sum(axis=-1).astype(mx.int32), tokens)
