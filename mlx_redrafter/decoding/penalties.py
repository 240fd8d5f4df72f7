"""Biases and penalties on logits, at every node of a tree by the text that leads to it.

A penalty looks at the last tokens of the text, so at a drafted node it looks at the text and the node's own
path: the numbers are those that plain decoding would see there. The formulas and their order are mlx-lm's.
"""

from collections.abc import Sequence

import mlx.core as mx

from .sampling import Sampling, Settings, padded
from .tree import Tree

NAMES = ("repetition", "presence", "frequency")


def penalty_settings(samplings: Sequence[Sampling]) -> dict[str, mx.array]:
    """What ``penalise`` needs to know of B texts, arrays [B] and biases [B, K]; {} if no text has any."""
    found: dict[str, mx.array] = {}
    if any(sampling.logit_bias for sampling in samplings):
        found["bias_tokens"] = padded([[t for t, _ in each.logit_bias] for each in samplings], -1)
        width = found["bias_tokens"].shape[1]
        rows = [[bias for _, bias in each.logit_bias] for each in samplings]
        found["bias"] = mx.array([[*row, *[0.0] * (width - len(row))] for row in rows], mx.float32)
    looks_back = [0]
    for name in NAMES:
        values = [getattr(each, f"{name}_penalty") for each in samplings]
        neutral = 1.0 if name == "repetition" else 0.0
        used = [value not in (0, neutral) for value in values]
        if any(used):
            sizes = [getattr(each, f"{name}_context_size") for each in samplings]
            found[name] = mx.array([v if use else neutral for v, use in zip(values, used, strict=True)])
            found[f"{name}_size"] = mx.array(sizes, mx.int32)
            looks_back += [size for size, use in zip(sizes, used, strict=True) if use]
    if max(looks_back):
        found["ages"] = mx.arange(max(looks_back) - 1, -1, -1)  # [R] of the tokens looked at; 0 is the last
    return found


def penalise(
    logits: mx.array, tree: Tree, history: mx.array, start: mx.array, settings: Settings
) -> mx.array:
    """Logits [B, N, V] after biases and penalties; arguments as the step has them."""
    if "bias" in settings:
        bias, tokens = settings["bias"], settings["bias_tokens"]
        logits = _add(logits, tokens[:, None], bias[:, None])
    if "ages" not in settings:
        return logits
    recent = recent_tokens(tree, history, start, settings["ages"])  # [B, N, R]
    for name in NAMES:
        if name not in settings:
            continue
        seen = (settings["ages"] < settings[f"{name}_size"][:, None])[:, None] & (recent >= 0)  # [B, N, R]
        penalty = settings[name].astype(logits.dtype)[:, None, None]  # [B, 1, 1]
        if name == "frequency":
            logits = _add(logits, recent, mx.where(seen, -penalty, 0))
            continue
        there = _add(mx.zeros_like(logits), recent, seen) > 0  # [B, N, V]
        if name == "repetition":
            changed = mx.where(logits < 0, logits * penalty, logits / penalty)
        else:
            changed = logits - penalty
        logits = mx.where(there, changed, logits)
    return logits


def recent_tokens(tree: Tree, history: mx.array, start: mx.array, ages: mx.array) -> mx.array:
    """The last tokens before what each node decides, itself included: [B, N, R]; negative: unknown.

    Args:
        tree: N nodes, the root at the place ``start`` of the text.
        history: [B, C] the text up to the root.
        start: [B].
        ages: [R] how many tokens before the node's own.
    """
    depth = tree.depths[..., None] - ages  # [B, N, R] where the token is: below the root, or before it
    place = mx.clip(start[:, None, None] + mx.minimum(depth, 0), 0, history.shape[1] - 1)
    batch, nodes, count = depth.shape
    before = mx.take_along_axis(history, place.reshape(batch, -1), axis=1).reshape(batch, nodes, count)
    before = mx.where(start[:, None, None] + depth >= 0, before, -1)
    is_there = tree.ancestors[:, :, None] & (tree.depths[:, None, None] == depth[..., None])  # [B, N, R, N]
    node = mx.argmax(is_there, axis=-1).reshape(batch, -1)  # [B, N * R]
    drafted = mx.take_along_axis(tree.tokens, node, axis=1).reshape(batch, nodes, count)
    return mx.where(depth > 0, drafted, before)


def _add(logits: mx.array, tokens: mx.array, values: mx.array) -> mx.array:
    """Logits [B, N, V] plus ``values`` at ``tokens``, both [B, N or 1, K]; negative tokens are left out."""
    batch, nodes, vocabulary = logits.shape
    shape = (batch * nodes, tokens.shape[-1])
    at = mx.broadcast_to(tokens, (batch, nodes, shape[1])).reshape(shape)
    added = mx.broadcast_to(mx.where(tokens >= 0, values, 0), (batch, nodes, shape[1])).reshape(shape)
    rows = mx.arange(shape[0])[:, None]
    flat = logits.reshape(-1, vocabulary)
    return flat.at[rows, mx.maximum(at, 0)].add(added.astype(logits.dtype)).reshape(logits.shape)
