"""Steps in which the host has a say: users' own samplers and logits processors, and grammars.

They are asked while the device verifies: the tree's tokens are handed over first, and read as soon as they
are known.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..decoding.layers import View
from ..decoding.state import DraftShape, State
from ..decoding.step import Pick, conclude, look_ahead, pick
from ..decoding.tree import Tree
from .grammar import masked
from .loop import Text, Unfinished, without_frames
from .runner import Runner


def host_step(
    usual: Runner, texts: Sequence[Text], shape: DraftShape, state: State, view: View
) -> tuple[State, Unfinished]:
    """The part of a step that needs nobody else; the rest is left to be done while the device works on it.

    It is not compiled.
    """
    shape = shape if usual.target.trees else shape.chain
    state, proposed, seen = look_ahead(usual.target, usual.drafter, shape, state, view)
    picks, leader = host_pick(texts), usual.target.leader
    picks = picks if leader is None else leader.sharing(picks, texts)
    finish = partial(conclude, picks, shape, proposed=proposed, seen=seen)
    return state, Unfinished(proposed.tree, seen.logits, finish)


def host_pick(texts: Sequence[Text]) -> Pick:
    """A ``Pick`` that asks the texts' grammars and functions at every node, by the tokens that lead to it."""

    def ask(tree: Tree, state: State, logits: mx.array, noise: mx.array | None) -> tuple[mx.array, mx.array]:
        if any(text.grammar for text in texts):
            logits = masked(logits, mx.array(_masks(texts, tree, logits.shape)))
        if any(text.processors for text in texts):
            paths = _paths(tree, state)
            processed = [_guarded(text, _processed, logits[i], paths[i]) for i, text in enumerate(texts)]
            logits = mx.stack([*processed, *logits[len(texts) :]])
        logits, tokens = pick(tree, state, logits, noise)
        if any(text.sampler for text in texts):
            sampled = [_guarded(text, _sampled, tokens[i], logits[i]) for i, text in enumerate(texts)]
            tokens = mx.stack([*sampled, *tokens[len(texts) :]])
        return logits, tokens

    return ask


def _masks(texts: Sequence[Text], tree: Tree, shape: tuple[int, ...]) -> Any:
    """Bits uint32 [B, N, words] of the tokens that may come after each node: all, without a grammar."""
    batch, nodes, vocabulary = shape
    words = -(-vocabulary // 32)
    masks = np.full((batch, nodes, words), ~np.uint32(0))
    tokens: Any = tree.tokens.tolist()
    parents: Any = tree.parents.tolist()
    for i, text in enumerate(texts):
        if text.grammar is not None:
            masks[i] = _guarded(text, _allowed, masks[i], (tokens[i], parents[i]))
    return masks


def _guarded(text: Text, change: Callable[[Text, Any, Any], Any], value: Any, by: Any) -> Any:
    """The value changed by the text's grammar or functions; unchanged once one of them has failed."""
    if text.error is None:
        try:
            return change(text, value, by)
        except Exception as error:  # whatever they raise ends their text only
            text.error = without_frames(error)
    return value


def _allowed(text: Text, masks: Any, tree: tuple[list[int], list[int]]) -> Any:
    """Bits [N, words] that a text's grammar allows at nodes of these tokens and parents."""
    assert text.grammar is not None
    text.grammar.follow(text.said)
    found = text.grammar.masks(*tree)[:, : masks.shape[1]]
    return np.pad(found, [(0, 0), (0, masks.shape[1] - found.shape[1])])


def _processed(text: Text, logits: mx.array, paths: list[list[int]]) -> mx.array:
    """Logits [N, V] of a text after its processors."""
    rows = [logits[i : i + 1] for i in range(len(paths))]
    for i, path in enumerate(paths):
        for process in text.processors:
            rows[i] = process(mx.array(path), rows[i])
    return mx.concatenate(rows).reshape(logits.shape)


def _sampled(text: Text, tokens: mx.array, logits: mx.array) -> mx.array:
    """Tokens [N] by the text's sampler for logits [N, V]; ``tokens`` where it has none."""
    if text.sampler is None:
        return tokens
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    drawn = [
        text.sampler(row).reshape(()) for row in mx.split(logprobs, len(logits))
    ]  # it may expect one row
    return mx.stack(drawn).astype(mx.int32)


def _paths(tree: Tree, state: State) -> list[list[list[int]]]:
    """For every text and node, the text's known tokens and those that lead to the node, its own included."""
    mx.eval(tree.tokens, tree.ancestors, state.history, state.rows)
    found = []
    histories: Any = state.history.tolist()
    rows: Any = state.rows.tolist()
    tokens: Any = tree.tokens.tolist()
    ancestors: Any = tree.ancestors.tolist()
    for history, held, said, above in zip(histories, rows, tokens, ancestors, strict=True):
        known = [token for token in history[:held] if token >= 0]
        found.append(
            [known + [t for t, is_there in zip(said, row, strict=True) if is_there] for row in above]
        )
    return found
