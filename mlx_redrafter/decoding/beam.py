"""Draft beam search: the drafter's best continuations of the last token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from .topk import top_k

LOWEST = -1e9  # stands for log 0, so that scores stay finite and comparable
# How far a beam trusts a copied token after so many tokens that agree, where it knows nothing itself: a
# drafter with few weights does not foresee what a text repeats word for word (docs/log.md).
TRUST = (0.0, 0.0, 0.3, 0.5, 0.85)


class Proposer(Protocol):
    """A recurrent drafter: one step of its state, and its head over the draft vocabulary."""

    start: mx.array  # [S], the state before the first token

    def advance(self, embedding: mx.array, state: mx.array) -> mx.array:
        """The embedding [..., H] and the state [..., S] -> the next state [..., S]."""
        ...

    def prepare(self, context: mx.array) -> mx.array:
        """[..., F] -> [..., P]: what ``logits`` needs of the context, once per step."""
        ...

    def look_back(self, rows: Any, count: mx.array, columns: int, history: mx.array, embed: Any) -> Any:
        """What is needed of the memory's buffers and the text, once per step (of a drafter with a memory)."""
        ...

    def logits(self, prepared: mx.array, state: mx.array, memory: Any = None) -> mx.array:
        """[..., P], [..., S] -> [..., V_draft], or more: those that the text adds."""
        ...

    def to_target(self, index: mx.array, memory: Any = None) -> mx.array:
        """Places [B, W] in the logits -> the target's token ids, of the same shape."""
        ...

    def from_target(self, tokens: mx.array, memory: Any = None) -> mx.array:
        """Token ids [B, W] -> their places in the logits, of the same shape; -1: they have none."""
        ...


@dataclass
class Beam:
    """The survivors of every depth; ``parents`` are places in the depth before (0 at the first)."""

    tokens: mx.array  # [B, L, W] the target's token ids
    parents: mx.array  # [B, L, W] in 0..W-1
    scores: mx.array  # [B, L, W] cumulative log-probability, never above the parent's


def draft(
    drafter: Proposer,
    embed: Callable[[mx.array], mx.array],
    token: mx.array,
    context: mx.array,
    width: int,
    length: int,
    memory: Any = None,
    copy: tuple[mx.array, mx.array] | None = None,
    noise: mx.array | None = None,
    kept: Callable[[mx.array], mx.array] | None = None,
) -> Beam:
    """Search ``length`` tokens ahead, keeping the ``width`` best beams (arXiv 2403.09919, section 3).

    Args:
        drafter: the drafter.
        embed: token ids [...] -> the target's embeddings [..., H].
        token: [B], the last token emitted.
        context: [B, F], what the drafter reads of the target.
        width: beams kept at each depth.
        length: tokens drafted.
        memory: what ``look_back`` gave; None: the drafter has none.
        copy: [B, L] what followed where the last tokens stood before, and how many these are [B]: a beam that
            has copied all so far may go on; None: beams do not copy.
        noise: [B, L, V] or more, what the target will add to its logits at each depth; None: nothing.
        kept: what is left of log-probabilities [B, W, V_draft] by the target's filters; None: all.
    """
    depths = []
    parents = mx.zeros((token.shape[0], width), mx.int32)  # [B, W]
    tokens = token[:, None]  # [B, 1]: the only beam before the first depth
    states = mx.broadcast_to(drafter.start, (*tokens.shape, drafter.start.size))  # [B, 1, S]
    scores = mx.zeros(tokens.shape, mx.float32)  # [B, 1]
    prepared = drafter.prepare(context)[:, None]  # [B, 1, P]
    seen = {} if memory is None else {"memory": memory}
    added, copies = None, mx.ones(tokens.shape, mx.bool_)  # [B, W] which beams have copied all so far
    if copy is not None:
        copied, match = mx.maximum(copy[0], 0), copy[1][:, None]
        agree = mx.where(match > 0, mx.minimum(match + mx.arange(length), len(TRUST) - 1), 0)
        trust, places = mx.array(TRUST)[agree], drafter.from_target(copied, **seen)  # [B, L]
    for depth in range(length):
        states = drafter.advance(embed(tokens), states)  # [B, W, S]
        rows = mx.broadcast_to(prepared, (*tokens.shape, prepared.shape[-1]))  # [B, W, P]
        logits = drafter.logits(rows, states, **seen)  # [B, W, V_draft]
        vocabulary = logits.shape[-1]
        if copy is not None:  # one place more, of a token to copy that has none
            logits = mx.pad(logits, [(0, 0), (0, 0), (0, 1)], constant_values=-mx.inf)
            place = places[:, depth, None]  # [B, 1]
            place = mx.where(place < 0, vocabulary, place)
        logs = log_softmax(logits)
        if copy is not None:
            logs = gate(logs, place, trust[:, depth, None] * copies)
        if kept is not None:
            logs = kept(logs)
        if noise is not None:
            if added is None:
                ids = mx.broadcast_to(mx.arange(vocabulary), (token.size, vocabulary))
                ids = drafter.to_target(ids, **seen)  # [B, V_draft]
                noise = noise[:, :length]
                added = mx.take_along_axis(noise, ids[:, None], axis=-1)  # [B, L, V_draft]
                if copy is not None:
                    last = mx.take_along_axis(noise, copied[..., None], axis=-1)
                    added = mx.concatenate([added, last], axis=-1)
            logs = log_softmax(logs + added[:, depth, None])
        total = scores[..., None] + logs
        scores, best = top_k(total.reshape(total.shape[0], -1), width)  # [B, W]
        parents, index = best // total.shape[-1], best % total.shape[-1]  # [B, W]
        if width > 1:
            states = mx.take_along_axis(states, parents[..., None], axis=1)  # [B, W, S]
        tokens = drafter.to_target(mx.minimum(index, vocabulary - 1), **seen)  # [B, W]
        if copy is not None:
            tokens = mx.where(index == vocabulary, copied[:, depth, None], tokens)
            copies = mx.take_along_axis(copies, parents, axis=1) & (index == place)
        depths.append((tokens, parents, scores))
    return Beam(*(mx.stack(list(values), axis=1) for values in zip(*depths, strict=True)))


def gate(logs: mx.array, place: mx.array, trust: mx.array) -> mx.array:
    """Log-probabilities [B, W, V_draft + 1] of beams that may copy a token.

    A mixture: what the drafter says, and the copied token by as much as that is trusted and it is not sure.

    Args:
        logs: [B, W, V_draft + 1], the last one's minus infinity or next to it.
        place: [B, 1] the copied token's: the last, if the drafter has none for it.
        trust: [B, W] or [B, 1].
    """
    share = trust[..., None] * mx.sqrt(1 - mx.exp(logs.max(axis=-1, keepdims=True)))  # [B, W, 1]
    place = mx.broadcast_to(place[..., None], share.shape)
    logs = logs + mx.log1p(-share)
    copied = mx.logaddexp(mx.take_along_axis(logs, place, axis=-1), mx.log(share))
    return mx.put_along_axis(logs, place, mx.minimum(copied, 0), axis=-1)


def log_softmax(logits: mx.array) -> mx.array:
    """Log-probabilities in float32, at most 0 and finite whatever the logits are (NaN included)."""
    logits = logits.astype(mx.float32)
    values = mx.minimum(logits - mx.logsumexp(logits, axis=-1, keepdims=True), 0.0)
    return mx.where(values > LOWEST, values, LOWEST)
