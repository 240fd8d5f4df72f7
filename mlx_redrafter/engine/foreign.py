"""Users' own samplers and logits processors, which see the tokens on the host."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..decoding.state import State
from ..decoding.step import Pick, pick
from ..decoding.tree import Tree
from .loop import Text, without_frames


def foreign_pick(texts: Sequence[Text]) -> Pick:
    """A ``Pick`` that asks the texts' functions at every node, with the tokens that lead to it.

    It reads the drafted tokens, so the host waits for them; steps that use it cannot be compiled.
    """

    def ask(tree: Tree, state: State, logits: mx.array) -> tuple[mx.array, mx.array]:
        if any(text.processors for text in texts):
            paths = _paths(tree, state)
            processed = [_guarded(text, _processed, logits[i], paths[i]) for i, text in enumerate(texts)]
            logits = mx.stack([*processed, *logits[len(texts) :]])
        logits, tokens = pick(tree, state, logits)
        sampled = [_guarded(text, _sampled, tokens[i], logits[i]) for i, text in enumerate(texts)]
        return logits, mx.stack([*sampled, *tokens[len(texts) :]])

    return ask


def _guarded(
    text: Text, change: Callable[[Text, mx.array, Any], mx.array], value: mx.array, by: Any
) -> mx.array:
    """The value changed by the text's functions; unchanged once one of them has failed."""
    if text.error is None:
        try:
            return change(text, value, by)
        except Exception as error:  # whatever users' functions raise ends their text only
            text.error = without_frames(error)
    return value


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
