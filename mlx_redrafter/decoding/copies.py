"""Places in the text where its last tokens stood before, and beams that copy what followed there.

A drafter with few weights does not foresee well what a text repeats, word for word: names, quotations, code,
loops. What followed the same tokens before is right more often than it, the more of them agree.
"""

import mlx.core as mx

LOWEST = -1e9  # stands for log 0, so that scores stay finite and comparable
LONGEST, SHORTEST = 4, 2  # tokens that must agree, tried from the longest
# How far a beam trusts what followed the same 0...4 tokens, where the drafter knows nothing (docs/log.md).
TRUST = (0.0, 0.0, 0.3, 0.5, 0.85)


def agreement(history: mx.array, end: mx.array) -> mx.array:
    """How many tokens up to each place of a text [B, C] are those up to its ``end`` [B], LONGEST at most."""
    columns = history.shape[1]
    padded = mx.pad(history, [(0, 0), (LONGEST - 1, 0)], constant_values=-1)
    agree = mx.ones(history.shape, mx.bool_)
    match = mx.zeros(history.shape, mx.int32)
    for back in range(LONGEST):
        start = LONGEST - 1 - back
        wanted = mx.take_along_axis(padded, (end + start)[:, None], axis=1)  # [B, 1]
        agree = agree & (padded[:, start : start + columns] == wanted) & (wanted >= 0)
        match = match + agree
    return match


def agreement_after(match: mx.array, parents: mx.array, tokens: mx.array, history: mx.array) -> mx.array:
    """The agreement [B, W, C] of beams: of their ``parents`` [B, W] in ``match``, and one of ``tokens``."""
    before = mx.take_along_axis(match, parents[..., None], axis=1)
    before = mx.pad(before[..., :-1], [(0, 0), (0, 0), (1, 0)])
    return mx.where(history[:, None] == tokens[..., None], mx.minimum(before + 1, LONGEST), 0)


def what_followed(history: mx.array, end: mx.array, match: mx.array) -> tuple[mx.array, mx.array]:
    """The token after the longest agreement of each beam, the latest of these, and how much it is trusted.

    Args:
        history, end: as in ``find``.
        match: [B, W, C].

    Returns:
        [B, W] and [B, W].
    """
    best, length = latest(match, end)
    place = mx.minimum(best + 1, history.shape[1] - 1)
    return mx.maximum(mx.take_along_axis(history, place, axis=1), 0), mx.array(TRUST)[length]


def latest(match: mx.array, end: mx.array) -> tuple[mx.array, mx.array]:
    """The latest place [B, W] before ``end`` of the longest agreement [B, W, C], and its length [B, W].

    It is 0 where not SHORTEST tokens agree.
    """
    place = mx.arange(match.shape[-1])
    match = mx.where((place < end[:, None, None]) & (match >= SHORTEST), match, 0)
    best = mx.argmax(match * match.shape[-1] + place, axis=-1, keepdims=True).astype(mx.int32)
    return best[..., 0], mx.take_along_axis(match, best, axis=-1)[..., 0]


def gate(logs: mx.array, index: mx.array, trust: mx.array) -> mx.array:
    """Log-probabilities [B, W, V_draft + 1] of beams that may copy a token, which comes last.

    They are a mixture: of what the drafter says, and the copied token by as much as that is trusted and the
    drafter is not sure.

    Args:
        logs: [B, W, V_draft].
        index: [B, W] the copied token's place in them; -1: it has none.
        trust: [B, W].
    """
    share = trust * mx.sqrt(1 - mx.exp(logs.max(axis=-1)))  # [B, W]
    rest = logs + mx.log1p(-share)[..., None]
    place = mx.maximum(index, 0)[..., None]
    own = mx.take_along_axis(rest, place, axis=-1)  # [B, W, 1]
    copied = mx.maximum(mx.log(share), LOWEST)[..., None]
    counted = (index >= 0)[..., None] & (copied > LOWEST)  # once
    last = mx.where(counted, mx.logaddexp(own, copied), copied)
    rest = mx.put_along_axis(rest, place, mx.where(counted, LOWEST, own), axis=-1)
    return mx.concatenate([rest, mx.minimum(last, 0.0)], axis=-1)
