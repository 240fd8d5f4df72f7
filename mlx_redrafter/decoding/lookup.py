"""Candidates copied from the text itself, as one more branch of the tree.

Names, code and quotations repeat. The last tokens of the text are looked up in the text before them, and
what followed there is proposed again (prompt lookup). It needs no model, only places in the tree.
"""

from dataclasses import dataclass

import mlx.core as mx

from .beam import LOWEST
from .tree import Candidates

LONGEST, SHORTEST = 4, 2  # tokens that must agree, tried from the longest
DECAY = 0.9  # of the record, per lookup that found something
# Hits and trials that stand for the time before the first lookup: the first copied token's by the length
# of the match (2, 3, 4), and the later ones' (once the one before was right).
PRIOR = ((0.5, 2.0), (0.8, 2.0), (1.2, 2.0), (3.0, 4.0))


@dataclass
class Found:
    """K tokens that followed the last occurrence of the text's end."""

    tokens: mx.array  # [B, K]
    match: mx.array  # [B] how many tokens agree, LONGEST at most; 0: nothing was found


def first_record(batch: int) -> mx.array:
    """[B, 4, 2], how often lookups were right: hits and trials, as in ``PRIOR``."""
    return mx.broadcast_to(mx.array(PRIOR), (batch, len(PRIOR), 2))


def find(history: mx.array, end: mx.array, count: int) -> Found:
    """Look the end of the text up in the text before it: the longest match, of these the latest.

    A copy that reaches the end of the text starts over from its beginning, so that loops are predicted.

    Args:
        history: [B, C] the text; unknown tokens are negative.
        end: [B] place of the last token.
        count: K, tokens wanted.
    """
    batch, columns = history.shape
    padded = mx.pad(history, [(0, 0), (LONGEST - 1, 0)], constant_values=-1)
    # [B, C, LONGEST]: the tokens up to each place.
    windows = mx.as_strided(padded, (batch, columns, LONGEST), (padded.shape[1], 1, 1))
    wanted = mx.take_along_axis(padded, end[:, None] + mx.arange(LONGEST), axis=1)[:, None]
    agree = ((windows == wanted) & (wanted >= 0)).astype(mx.int32)
    match = mx.cumprod(agree, axis=-1, reverse=True).sum(axis=-1)  # [B, C] tokens that agree, from the last
    place = mx.arange(columns)
    match = mx.where((place < end[:, None]) & (match >= SHORTEST), match, 0)
    best = mx.argmax(match * columns + place, axis=1, keepdims=True)  # [B, 1]
    period = mx.maximum(end[:, None] - best, 1)
    places = mx.minimum(best + 1 + mx.arange(count) % period, columns - 1)
    tokens = mx.take_along_axis(history, places, axis=1)
    return Found(tokens, mx.take_along_axis(match, best, axis=1)[:, 0])


def scores(found: Found, record: mx.array) -> mx.array:
    """Log-probability [B, K] that all copied tokens up to each one are right, by the record."""
    rates = mx.log(record[..., 0] / record[..., 1])  # [B, 4]
    kind = mx.maximum(found.match - SHORTEST, 0)[:, None]
    first, later = mx.take_along_axis(rates, kind, axis=1), rates[:, -1:]  # [B, 1]
    values = first + later * mx.arange(found.tokens.shape[1])
    return mx.where((found.match > 0)[:, None], values, LOWEST)


def learn(record: mx.array, found: Found, tokens: mx.array, count: mx.array) -> mx.array:
    """The record after a step.

    Args:
        record: [B, 4, 2].
        found: what was looked up before the step.
        tokens: [B, L+1] what the step emitted; the first ``count`` [B] are valid.
    """
    seen = min(found.tokens.shape[1], tokens.shape[1])
    valid = mx.arange(seen) < count[:, None]
    right = (found.tokens[:, :seen] == tokens[:, :seen]) & valid
    run = mx.cumprod(right.astype(mx.float32), axis=1).sum(axis=1)  # [B] copied tokens that were right
    tried = mx.minimum(run + 1, valid.sum(axis=1))  # [B] of them and the first wrong one
    begun = (run > 0).astype(mx.float32)
    first = mx.stack([begun, mx.ones_like(begun)], axis=-1)[:, None]  # [B, 1, 2]
    later = mx.stack([run - begun, begun * (tried - 1)], axis=-1)[:, None]
    kind = mx.arange(len(PRIOR) - 1) == (found.match - SHORTEST)[:, None]  # [B, 3]
    change = mx.concatenate([mx.where(kind[..., None], first, 0.0), later], axis=1)  # [B, 4, 2]
    touched = (change[..., 1:] > 0) & (found.match > 0)[:, None, None]
    prior = mx.array(PRIOR)
    return mx.where(touched, prior + DECAY * (record - prior) + change, record)


def alone(found: Found, scores: mx.array) -> Candidates:
    """The copy as the only candidates; its ``scores`` are [B, K]."""
    places = mx.arange(-1, found.tokens.shape[1] - 1)
    return Candidates(
        found.tokens, mx.broadcast_to(places, found.tokens.shape), scores, [-1] * found.tokens.shape[1]
    )


def merge(drafted: Candidates, found: Found, scores: mx.array) -> Candidates:
    """Add the copy to the drafted candidates, whose places then come first.

    Where a drafted path says the same, the copy has no nodes of its own, and the drafted ones take the
    better score. A child still never scores above its parent: both chains only fall.

    Args:
        drafted: candidates in the order of their depths.
        found: K copied tokens.
        scores: [B, K] their log-probabilities.
    """
    size, count = drafted.tokens.shape[1], found.tokens.shape[1]
    parent = mx.full((found.tokens.shape[0],), -1, mx.int32)  # [B] place of the copy's node before
    parents, duplicates, better = [], [], drafted.scores
    for depth in range(count):
        parents.append(parent)
        same = (drafted.parents == parent[:, None]) & (drafted.tokens == found.tokens[:, depth, None])
        duplicate = same.any(axis=1)
        better = mx.where(same, mx.maximum(better, scores[:, depth, None]), better)
        duplicates.append(duplicate)
        parent = mx.where(duplicate, mx.argmax(same, axis=1).astype(mx.int32), size + depth)
    left_out = mx.stack(duplicates, axis=1)  # [B, K]
    return Candidates(
        mx.concatenate([drafted.tokens, mx.where(left_out, -1, found.tokens)], axis=1),
        mx.concatenate([drafted.parents, mx.stack(parents, axis=1)], axis=1),
        mx.concatenate([better, mx.where(left_out, -mx.inf, scores)], axis=1),
        [*drafted.ranks, *[-1] * count],
    )
