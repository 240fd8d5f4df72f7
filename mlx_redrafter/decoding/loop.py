"""The host's side of decoding: keep the device busy, grow the buffers, stop."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from .cache import Cache, commit, grow
from .step import DraftShape, Output, State

BUCKET = 256  # rows by which buffers grow

Step = Callable[[State], tuple[State, Output]]


@dataclass
class Emitted:
    """The tokens of one step; all but the last were drafted, unless a stop cut them short."""

    tokens: list[int]
    drafted: int  # how many of `tokens`, from the first, were drafted
    logits: mx.array  # [D+1, V], lazy: the target's logits from which the tokens were picked


def decode(
    step: Step,
    shape: DraftShape,
    state: State,
    rows: int,
    limit: int,
    stop: frozenset[int],
    release: Callable[[Cache, int], None] = lambda cache, rows: None,
) -> Generator[Emitted, None, None]:
    """Run steps until ``limit`` tokens or one of the ``stop`` tokens (which is emitted) has come.

    While the device runs one step, the host builds the next; it hands that over once the first is
    done, because buffers are updated in place only when nothing else reads them.

    Args:
        step: one decoding step, for a batch of one.
        shape: the draft shape of ``step``.
        state: its cache holds all tokens so far except the last; the caller must not keep it.
        rows: how many these are.
        limit: tokens to emit at most, 1 or more.
        stop: token ids that end the text.
        release: gets the cache in the end, and how many rows belong to what was emitted.
    """
    state, output = step(with_room(state, rows, shape))
    try:
        enqueue(state, output)
        while True:
            following = step(with_room(state, rows + shape.depth + 1, shape))
            emitted, count = _read(output, limit, stop)
            limit -= len(emitted.tokens)
            rows += len(emitted.tokens)
            if limit == 0 or emitted.tokens[-1] in stop:
                yield emitted
                return
            assert len(emitted.tokens) == count
            state, output = following
            del following
            enqueue(state, output)
            yield emitted
    finally:
        release(commit(state.cache), rows)


def enqueue(state: State, output: Output) -> None:
    """Hand a step over to the device."""
    cache = vars(state.cache)
    mx.async_eval(output.tokens, output.count, state.token, state.context, state.length, state.key, cache)


def with_room(state: State, rows: int, shape: DraftShape) -> State:
    """The state with buffers large enough for ``rows`` and what a step writes behind them."""
    needed = rows + max(shape.size, shape.depth + 1)
    if needed <= state.cache.capacity:
        return state
    return replace(state, cache=grow(state.cache, -(-needed // BUCKET) * BUCKET))


def _read(output: Output, limit: int, stop: frozenset[int]) -> tuple[Emitted, int]:
    """What the user gets of a step, and how many tokens it had: the only wait for the device."""
    row: Any = output.tokens[0].tolist()
    count: Any = output.count[0].tolist()
    tokens = until_end(row[:count], limit, stop)
    return Emitted(tokens, min(len(tokens), count - 1), output.logits[0]), count


def until_end(tokens: list[int], limit: int, stop: frozenset[int]) -> list[int]:
    """The first ``limit`` tokens, up to the first of the ``stop`` tokens."""
    tokens = tokens[:limit]
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]
