"""Acceptance by real decoding, many prompts at once.

Speculative decoding is exact at any batch size and one forward pass costs little more for several
rows, so prompts are decoded together. A row's numbers are those of decoding it alone.
"""

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from ..decoding.beam import Drafter
from ..decoding.cache import Cache, commit
from ..decoding.loop import GRAIN, Step, enqueue, until_end, view, with_room
from ..decoding.runner import Runner
from ..decoding.sampling import Sampling
from ..decoding.step import DraftShape, Pick, State, begin
from ..model import SpeculativeModel
from ..prompts import Prompt, encode
from ..stream import PREFILL_STEP_SIZE, check_shape
from ..target import Target, from_prompt_cache
from .streams import Workers

RESAMPLES = 2000  # of the bootstrap
CONFIDENCE = 95  # per cent


@dataclass
class Row:
    """What was decoded after one prompt; the first token comes from the prompt, without a step."""

    tokens: list[int]
    accepted: list[int]  # for each depth, the steps that emitted the token drafted there
    steps: int = 0

    @property
    def emitted(self) -> int:
        """Tokens that came from steps."""
        return len(self.tokens) - 1


@dataclass
class Decoded:
    """What was decoded after each of B prompts, in their order."""

    rows: list[Row]

    @property
    def tokens(self) -> list[list[int]]:
        """The text of each row, its stop token included."""
        return [row.tokens for row in self.rows]


@dataclass(frozen=True)
class Measured:
    """How a draft shape fared.

    Attributes:
        shape: how much was drafted.
        temperature: at which tokens were sampled; 0 is greedy.
        prompts: how many were decoded.
        tokens: emitted by steps, that is without each text's first.
        steps: verification steps.
        tokens_per_step: ``tokens`` / ``steps``; 0 if no text needed a step.
        acceptance: for each depth, the share of the steps that emitted the token drafted there.
        by_category: tokens per step of the prompts of each category that has a name.
        low, high: 95 % interval of ``tokens_per_step`` for other prompts of the same kind (bootstrap).
    """

    shape: DraftShape
    temperature: float
    prompts: int
    tokens: int
    steps: int
    tokens_per_step: float
    acceptance: list[float]
    by_category: dict[str, float] = field(default_factory=dict)
    low: float = 0.0
    high: float = 0.0


def evaluate(
    model: SpeculativeModel,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    shapes: Sequence[DraftShape],
    temperatures: Sequence[float] = (0.0, 0.7),
    max_tokens: int = 256,
    batch: int = 8,
    seed: int = 0,
    progress: Callable[..., Iterable[Any]] = tqdm,
    deadline: float | None = None,
    workers: Workers | None = None,
) -> list[Measured]:
    """Decode the answers to ``prompts`` with every shape at every temperature.

    Prompts of like length are decoded together. Batches come in random order and each one is decoded
    in every way before the next, so that a deadline leaves a fair sample of the prompts for each way.

    Args:
        model: a model with a drafter.
        tokenizer: the model's.
        prompts: what to answer.
        shapes: how much is drafted.
        temperatures: 0 is greedy.
        max_tokens: per answer, at most.
        batch: prompts decoded at once.
        seed: of sampling, the order of batches, and the bootstrap.
        progress: called as ``tqdm`` is, with something to go through, ``desc``, ``unit`` and ``total``.
        deadline: in seconds of ``time.monotonic``; batches begun before it are finished, and one at least is.
        workers: each decodes a batch of its own.

    Returns:
        For each shape and temperature that was reached, how it fared on ``Measured.prompts`` prompts.

    Raises:
        ValueError: the model has no drafter, a number is out of range, or a prompt is too long.
    """
    _check_numbers(max_tokens, batch)
    workers = workers or Workers(1)
    target, drafter = _check_model(model, shapes)
    ids = encode_all(model, tokenizer, prompts)
    batches = _batches(ids, batch, seed)
    keys = mx.random.split(mx.random.key(seed), len(batches))
    stop = frozenset(tokenizer.eos_token_ids)
    ways = [(shape, Sampling(temperature)) for shape in shapes for temperature in temperatures]
    found: list[list[tuple[int, Row]]] = [[] for _ in ways]  # prompts by number
    work = [(number, way) for number in range(len(batches)) for way in range(len(ways))]
    mx.eval(keys)

    def decode(item: int) -> Decoded | None:
        if deadline is not None and item and time.monotonic() >= deadline:
            return None
        number, way = work[item]
        shape, sampling = ways[way]
        inputs = [ids[i] for i in batches[number]]
        return decode_batch(
            target,
            drafter,
            sampling.pick,
            shape,
            inputs,
            max_tokens,
            stop,
            keys[number],
            workers.cancelled.is_set,
        )

    with wired_limit(model.model):
        items = workers.each(decode, len(work))
        for item, decoded in progress(items, desc="Evaluating", unit="batch", total=len(work)):
            number, way = work[item]
            if decoded is not None:
                found[way] += zip(batches[number], decoded.rows, strict=True)
    results = zip(ways, found, strict=True)
    return [
        measure(
            shape, way.temperature, [(prompts[i], row) for i, row in sorted(rows, key=itemgetter(0))], seed
        )
        for (shape, way), rows in results
        if rows
    ]


def parse_shape(text: str) -> DraftShape:
    """``width,length``, ``width,length,nodes`` or ``width,length,nodes,lookup``; nodes may be ``all``."""
    parts = [part.strip() for part in text.split(",")]
    numbers = [int(part) if part.isdecimal() else None for part in parts]
    usable = [part.isdecimal() or (place == 2 and part == "all") for place, part in enumerate(parts)]
    if not all(usable) or len(parts) not in (2, 3, 4):
        raise ValueError(
            f"shape {text!r} is not usable: give WIDTH,LENGTH or WIDTH,LENGTH,NODES such as 1,4, or "
            "WIDTH,LENGTH,NODES,LOOKUP such as 3,3,8,4."
        )
    return DraftShape(*numbers)  # type: ignore[arg-type]


def measure(
    shape: DraftShape, temperature: float, found: Sequence[tuple[Prompt, Row]], seed: int = 0
) -> Measured:
    """Sum up what was decoded after each prompt."""
    rows = [row for _, row in found]
    tokens, steps = sum(row.emitted for row in rows), sum(row.steps for row in rows)
    low, high = interval([row.emitted for row in rows], [row.steps for row in rows], seed)
    return Measured(
        shape,
        temperature,
        len(rows),
        tokens,
        steps,
        tokens_per_step(rows),
        [sum(hits) / steps if steps else 0.0 for hits in zip(*(row.accepted for row in rows), strict=True)],
        _by_category(found),
        low,
        high,
    )


def tokens_per_step(rows: Sequence[Row]) -> float:
    """Of all rows together; 0 if none needed a step."""
    steps = sum(row.steps for row in rows)
    return sum(row.emitted for row in rows) / steps if steps else 0.0


def interval(tokens: Sequence[int], steps: Sequence[int], seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of sum(tokens) / sum(steps) over P prompts drawn with replacement.

    Args:
        tokens: [P], and so ``steps``.
    """
    if not any(steps):
        return 0.0, 0.0
    draws = np.random.default_rng(seed).integers(len(steps), size=(RESAMPLES, len(steps)))  # [R, P]
    tokens_drawn = np.asarray(tokens)[draws].sum(axis=1)  # [R]
    steps_drawn = np.asarray(steps)[draws].sum(axis=1)
    ratios = tokens_drawn[steps_drawn > 0] / steps_drawn[steps_drawn > 0]
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return float(low), float(high)


def decode_batch(
    target: Target,
    drafter: Drafter,
    pick: Pick,
    shape: DraftShape,
    prompts: Sequence[list[int]],
    max_tokens: int,
    stop: frozenset[int],
    key: mx.array,
    cancelled: Callable[[], bool] = lambda: False,
) -> Decoded:
    """Decode all prompts at once.

    Args:
        target: the model.
        drafter: its drafter.
        pick: how a token is picked from logits.
        shape: how much is drafted.
        prompts: token ids, one or more each.
        max_tokens: of each text, 1 or more; the first one, from the prompt, counts.
        stop: token ids that end a text, and belong to it.
        key: for random numbers.
        cancelled: asked before each step; True ends decoding early.
    """
    run = Runner(target, drafter, pick)
    group = _Group(run, shape, max_tokens, stop, _prefill(target, pick, prompts, key))
    rows = group.rows
    while group.rows and not cancelled():
        group.advance()
    return Decoded(rows)


@dataclass
class _Start:
    """B prompts that have been read."""

    state: State
    lengths: list[int]  # [B] tokens of each prompt
    first: list[int]  # [B] the token that follows each


class _Group:
    """Rows that are decoded together; those that have ended are dropped."""

    def __init__(
        self, step: Step, shape: DraftShape, max_tokens: int, stop: frozenset[int], start: _Start
    ) -> None:
        self.step, self.shape, self.max_tokens, self.stop = step, shape, max_tokens, stop
        self.state, self.lengths = start.state, list(start.lengths)
        self.rows = [Row([token], [0] * shape.depth) for token in start.first]

    def advance(self) -> None:
        """Decode one step, without the rows that have ended."""
        self._drop_ended()
        if not self.rows:
            return
        most = max(self.lengths)
        self.state = with_room(self.state, most, self.shape)
        self.state, output = self.step(self.shape, self.state, view(self.state, most, self.shape))
        enqueue(self.state, output)
        tokens: Any = output.tokens.tolist()
        counts: Any = output.count.tolist()
        for i, (row, count) in enumerate(zip(self.rows, counts, strict=True)):
            self.lengths[i] += count
            take_step(row, tokens[i][:count], self.max_tokens, self.stop)

    def _drop_ended(self) -> None:
        keep = [i for i, row in enumerate(self.rows) if not self._has_ended(row)]
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in keep]
        self.lengths = [self.lengths[i] for i in keep]
        if keep:
            self.state = _gather(self.state, mx.array(keep))

    def _has_ended(self, row: Row) -> bool:
        return len(row.tokens) == self.max_tokens or row.tokens[-1] in self.stop


def take_step(row: Row, tokens: list[int], max_tokens: int, stop: frozenset[int]) -> None:
    """Add to a row what a step emitted, all but the last of ``tokens`` drafted, up to the text's end."""
    kept = until_end(tokens, max_tokens - len(row.tokens), stop)
    row.tokens += kept
    row.steps += 1
    for depth in range(min(len(kept), len(tokens) - 1)):
        row.accepted[depth] += 1


def _prefill(target: Target, pick: Pick, prompts: Sequence[list[int]], key: mx.array) -> _Start:
    """Read every prompt by itself."""
    key, first_key = mx.random.split(key)
    logits, contexts, caches = [], [], []
    for prompt in prompts:
        layers = target.make_cache()
        seen, context = target.read_prompt(prompt, PREFILL_STEP_SIZE, lambda done, total: None, layers)
        logits.append(seen)
        contexts.append(context)
        caches.append(from_prompt_cache(layers))
    lengths = [len(prompt) for prompt in prompts]
    token = pick(mx.concatenate(logits), first_key)  # [B]
    stacked = stack_caches(caches, lengths)
    state = begin(token, mx.concatenate(contexts), stacked, prompts, lengths, key)
    first: Any = token.tolist()
    mx.eval(vars(stacked), state.context)
    return _Start(state, lengths, first)


def stack_caches(caches: Sequence[Cache], lengths: Sequence[int]) -> Cache:
    """One cache of B rows from B caches of one row, whose first ``lengths`` [B] places are filled."""
    capacity = math.ceil(max(lengths) / GRAIN) * GRAIN

    def stack(buffers: Sequence[mx.array]) -> mx.array:  # B times [1, Hkv, C, D]
        filled = [buffer[:, :, :n] for buffer, n in zip(buffers, lengths, strict=True)]
        pads = [[(0, 0), (0, 0), (0, capacity - n), (0, 0)] for n in lengths]
        return mx.concatenate([mx.pad(x, p) for x, p in zip(filled, pads, strict=True)])  # [B, Hkv, C, D]

    keys = [stack(layer) for layer in zip(*(cache.keys for cache in caches), strict=True)]
    values = [stack(layer) for layer in zip(*(cache.values for cache in caches), strict=True)]
    return Cache(keys, values)


def _gather(state: State, keep: mx.array) -> State:
    """The rows ``keep`` of a state."""
    cache = commit(state.cache)
    cache = Cache([k[keep] for k in cache.keys], [v[keep] for v in cache.values])
    rows = {name: getattr(state, name)[keep] for name in ("token", "context", "length", "history", "record")}
    return State(**rows, cache=cache, key=state.key)


def _check_model(model: SpeculativeModel, shapes: Sequence[DraftShape]) -> tuple[Target, Drafter]:
    if model.drafter is None or model.target is None:
        raise ValueError("the model has no drafter: name one to evaluate.")
    for shape in shapes:
        check_shape(shape, model.drafter.config.head_outputs)
    return model.target, model.drafter


def encode_all(
    model: SpeculativeModel, tokenizer: TokenizerWrapper, prompts: Sequence[Prompt]
) -> list[list[int]]:
    """The prompts' token ids; ``ValueError`` if there are none, or one is too long for the model."""
    if not prompts:
        raise ValueError("there are no prompts: give one or more.")
    ids = [encode(prompt, tokenizer) for prompt in prompts]
    model.check_prompts(ids)
    return ids


def _batches(ids: Sequence[list[int]], batch: int, seed: int) -> list[list[int]]:
    """Places of prompts of like length, in batches that come in random order."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    random.Random(seed).shuffle(batches)
    return batches


def _by_category(found: Sequence[tuple[Prompt, Row]]) -> dict[str, float]:
    names = dict.fromkeys(prompt.category for prompt, _ in found if prompt.category)
    groups = {name: [row for prompt, row in found if prompt.category == name] for name in sorted(names)}
    return {name: tokens_per_step(rows) for name, rows in groups.items() if any(row.steps for row in rows)}


def _check_numbers(max_tokens: int, batch: int) -> None:
    for name, value in (("max tokens", max_tokens), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} {value} is not usable: give 1 or more.")
