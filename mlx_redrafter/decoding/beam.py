"""Draft beam search: the drafter's best continuations of the last token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from .copies import LOWEST, agreement, agreement_after, gate, what_followed
from .topk import top_k


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
    text: tuple[mx.array, mx.array] | None = None,
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
        text: [B, C] and the place [B] of its last token: a beam may copy what followed its last tokens there.
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
    added = None
    match = None if text is None else agreement(*text)[:, None]  # [B, 1, C]
    for depth in range(length):
        states = drafter.advance(embed(tokens), states)  # [B, W, S]
        rows = mx.broadcast_to(prepared, (*tokens.shape, prepared.shape[-1]))  # [B, W, P]
        logits = drafter.logits(rows, states, **seen)  # [B, W, V_draft]
        vocabulary, copied = logits.shape[-1], tokens
        if noise is not None and added is None:
            everything = mx.broadcast_to(mx.arange(vocabulary), (token.size, vocabulary))
            ids = drafter.to_target(everything, **seen)  # [B, V_draft]
            added = mx.take_along_axis(noise, ids[:, None], axis=-1)  # [B, L, V_draft]
        more = None if added is None else added[:, depth, None]
        logs = log_softmax(logits)
        if text is not None and match is not None:
            copied, trust = what_followed(*text, match)  # [B, W]
            logs = gate(logs, drafter.from_target(copied, **seen), trust)
            if noise is not None and more is not None:
                last = mx.take_along_axis(noise[:, depth], copied, axis=-1)  # [B, W]
                more = mx.broadcast_to(more, (*copied.shape, vocabulary))
                more = mx.concatenate([more, last[..., None]], axis=-1)
        if kept is not None:
            logs = kept(logs)
        if more is not None:
            logs = log_softmax(logs + more)
        total = scores[..., None] + logs  # [B, W, V_draft], or one more
        scores, best = top_k(total.reshape(total.shape[0], -1), width)  # [B, W]
        parents, index = best // total.shape[-1], best % total.shape[-1]  # [B, W]
        if width > 1:
            states = mx.take_along_axis(states, parents[..., None], axis=1)  # [B, W, S]
        said = drafter.to_target(mx.minimum(index, vocabulary - 1), **seen)  # [B, W]
        tokens = mx.where(index < vocabulary, said, mx.take_along_axis(copied, parents, axis=1))
        if text is not None and match is not None:
            match = agreement_after(match, parents, tokens, text[0])  # [B, W, C]
        depths.append((tokens, parents, scores))
    return Beam(*(mx.stack(list(values), axis=1) for values in zip(*depths, strict=True)))


def log_softmax(logits: mx.array) -> mx.array:
    """Log-probabilities in float32, at most 0 and finite whatever the logits are (NaN included)."""
    logits = logits.astype(mx.float32)
    values = mx.minimum(logits - mx.logsumexp(logits, axis=-1, keepdims=True), 0.0)
    return mx.where(values > LOWEST, values, LOWEST)
