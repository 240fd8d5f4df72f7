"""The host's side of decoding: keep the device busy, choose the shape, grow the buffers, stop."""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx

from .cache import Cache, View, commit, grow
from .step import DraftShape, Output, State

GRAIN = 256  # rows: the smallest unit by which buffers grow
FIRST_LAYERS = 2  # are handed over first, enough work for a device while the host does the rest

Step = Callable[[DraftShape, State, View], tuple[State, Output]]


class Policy(Protocol):
    """Which draft shape to use next."""

    def choose(self, rows: int) -> DraftShape:
        """The shape of the next step, behind ``rows`` tokens; asked before the step that runs is known."""
        ...

    def observe(self, shape: DraftShape, ranks: list[int], seconds: float, away: float = 0.0) -> None:
        """A step came out, ``seconds`` after the one before; the host had other work for ``away`` of them.

        ``ranks`` has, for each drafted token that it emitted, the beam it came from, or -1: copied.
        """
        ...


@dataclass(frozen=True)
class Fixed:
    """The policy that always uses one shape."""

    shape: DraftShape

    def choose(self, rows: int) -> DraftShape:
        """The shape."""
        return self.shape

    def observe(self, shape: DraftShape, ranks: list[int], seconds: float, away: float = 0.0) -> None:
        """Nothing to learn."""


@dataclass
class Emitted:
    """The tokens of one step; all but the last were drafted, unless a stop cut them short."""

    tokens: list[int]
    drafted: int  # how many of `tokens`, from the first, were drafted
    logits: mx.array  # [D+1, V], lazy: the target's logits from which the tokens were picked
    shape: DraftShape
    ranks: list[int]  # of the drafted tokens: the beam each came from, -1: copied from the text
    waited: float = 0.0  # seconds between the step before and handing this one over


def decode(
    step: Step,
    policy: Policy,
    state: State,
    rows: int,
    limit: int,
    stop: frozenset[int],
    release: Callable[[Cache, int], None] = lambda cache, rows: None,
    grain: int = GRAIN,
) -> Generator[Emitted, None, None]:
    """Run steps until ``limit`` tokens or one of the ``stop`` tokens (which is emitted) has come.

    While the device runs one step, the host builds the next; it hands that over once the first is
    done, because buffers are updated in place only when nothing else reads them. A step is handed over
    in two parts: on a CPU, MLX's hand-over waits until nearly all operations are done, so the many
    small ones behind the logits come after the next step has been built.

    Args:
        step: one decoding step, for a batch of one.
        policy: chooses each step's draft shape.
        state: its cache holds all tokens so far except the last; the caller must not keep it.
        rows: how many these are.
        limit: tokens to emit at most, 1 or more.
        stop: token ids that end the text.
        release: gets the cache in the end, and how many rows belong to what was emitted.
        grain: rows by which attention's view of the buffers grows, while it is short; 1: always one by one.
    """
    shape = policy.choose(rows)
    state = with_room(state, rows, shape)
    state, output = step(shape, state, view(state, rows, shape, grain))
    waited, busy, before = 0.0, 0.0, time.perf_counter()
    try:
        start(state, output)
        while True:
            most = rows + shape.depth + 1
            following = policy.choose(most)
            ahead = None
            if has_room(state, most, following):
                ahead = step(following, state, view(state, most, following, grain, known=shape.depth == 0))
            built = time.perf_counter()
            enqueue(state, output)
            emitted, count = _read(output, limit, stop, shape)
            emitted.waited, arrived = waited, time.perf_counter()
            took, before = arrived - before, arrived
            away = took - busy - (arrived - built) if busy else took  # the first step may be like no other
            limit -= len(emitted.tokens)
            rows += len(emitted.tokens)
            if limit == 0 or emitted.tokens[-1] in stop:
                yield emitted
                return
            assert len(emitted.tokens) == count
            if ahead is None:
                state = with_room(state, rows, following)
                ahead = step(following, state, view(state, rows, following, grain))
            shape, (state, output) = following, ahead
            del ahead
            waited = time.perf_counter() - arrived
            start(state, output)
            busy = time.perf_counter() - arrived - waited
            policy.observe(emitted.shape, emitted.ranks, took, away)
            yield emitted
    finally:
        release(commit(state.cache), rows)


def start(state: State, output: Output) -> None:
    """Hand the heavy part of a step over to the device: its first layers at once.

    MLX walks all of a graph before it hands over the first operation, so with the first layers going
    ahead, the device need not wait for the walk through the others.
    """
    mx.async_eval(state.cache.keys[:FIRST_LAYERS][-1])
    mx.async_eval(output.verified)


def enqueue(state: State, output: Output) -> None:
    """Hand over what remains of a step."""
    parts = {**vars(state), "cache": vars(state.cache)}
    mx.async_eval(output.tokens, output.count, output.ranks, parts)


def bucket(rows: int, grain: int = GRAIN) -> int:
    """The next larger of the sizes in use: eight for each doubling, multiples of ``grain``.

    So a text of T tokens meets few of them, about 8 * log2(T / grain), and wastes at most an eighth.
    With a ``grain`` of 1, all sizes are in use.
    """
    unit = max(grain, 1 << max(rows.bit_length() - 4, 0)) if grain > 1 else 1
    return -(-rows // unit) * unit


def view(state: State, rows: int, shape: DraftShape, grain: int = GRAIN, known: bool = True) -> View:
    """What attention is shown of the buffers in a step behind ``rows``: if not ``known``, at most so many."""
    columns = min(bucket(rows + shape.size, grain), state.cache.capacity)
    return View(columns, known and columns == rows + shape.size)


def has_room(state: State, rows: int, shape: DraftShape) -> bool:
    """Whether the buffers hold ``rows`` and what a step writes behind them."""
    return _needed(rows, shape) <= state.cache.capacity


def with_room(state: State, rows: int, shape: DraftShape) -> State:
    """The state with buffers large enough for ``rows`` and what a step writes behind them."""
    if has_room(state, rows, shape):
        return state
    capacity = bucket(_needed(rows, shape))
    missing = capacity - state.history.shape[1]
    history = mx.pad(state.history, [(0, 0), (0, missing)], constant_values=-1)
    return replace(state, cache=grow(state.cache, capacity), history=history)


def _needed(rows: int, shape: DraftShape) -> int:
    return rows + max(shape.size, shape.depth + 2)


def _read(output: Output, limit: int, stop: frozenset[int], shape: DraftShape) -> tuple[Emitted, int]:
    """What the user gets of a step, and how many tokens it had: the only wait for the device."""
    row: Any = output.tokens[0].tolist()
    count: Any = output.count[0].tolist()
    ranks: Any = output.ranks[0].tolist()
    tokens = until_end(row[:count], limit, stop)
    drafted = min(len(tokens), count - 1)
    return Emitted(tokens, drafted, output.logits[0], shape, ranks[1 : 1 + drafted]), count


def until_end(tokens: list[int], limit: int, stop: frozenset[int]) -> list[int]:
    """The first ``limit`` tokens, up to the first of the ``stop`` tokens."""
    tokens = tokens[:limit]
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]
