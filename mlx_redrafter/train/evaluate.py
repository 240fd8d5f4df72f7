"""Acceptance by real decoding, many prompts at once.

Speculative decoding is exact at any batch size and one forward pass costs little more for several
rows, so prompts are decoded together. A row's numbers are those of decoding it alone.
"""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
from mlx_lm.generate import wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from ..conversations import Prompt, encode
from ..decoding.sampling import Sampling
from ..decoding.state import DraftShape
from ..engine.engine import Request
from ..engine.loop import Emitted, Fixed
from ..model import SpeculativeModel
from ..text import check_shape
from .streams import Workers

RESAMPLES = 2000  # of the bootstrap
CONFIDENCE = 95  # per cent


@dataclass
class Row:
    """What was decoded after one prompt; the first tokens come with the prompt's last, and do not count."""

    tokens: list[int]  # a stop token included
    accepted: list[int]  # for each depth, the steps that emitted the token drafted there
    steps: int = 0
    first: int = 1

    @property
    def emitted(self) -> int:
        """Tokens that came from the steps that count."""
        return len(self.tokens) - self.first

    def take(self, emitted: Emitted) -> None:
        """Add what a step gave."""
        if self.tokens:
            self.steps += 1
            for depth in range(emitted.drafted):
                self.accepted[depth] += 1
        else:
            self.first = len(emitted.tokens)
        self.tokens += emitted.tokens


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
        deadline: in seconds of ``time.monotonic``; one batch is decoded whatever it is, others if they
            will take no longer than the slowest so far.
        workers: each decodes a batch of its own.

    Returns:
        For each shape and temperature that was reached, how it fared on ``Measured.prompts`` prompts.

    Raises:
        ValueError: the model has no drafter, a number is out of range, or a prompt is too long.
    """
    _check_numbers(max_tokens, batch)
    workers = workers or Workers(1)
    _check_model(model, shapes)
    ids = encode_all(model, tokenizer, prompts)
    batches = _batches(ids, batch, seed)
    stop = frozenset(tokenizer.eos_token_ids)
    ways = [(shape, Sampling(temperature)) for shape in shapes for temperature in temperatures]
    found: list[list[tuple[int, Row]]] = [[] for _ in ways]  # prompts by number
    work = [(number, way) for number in range(len(batches)) for way in range(len(ways))]
    took = [0.0]  # seconds per batch

    def decode(item: int) -> list[Row] | None:
        began = time.monotonic()
        if deadline is not None and item and began + max(took) >= deadline:
            return None
        number, way = work[item]
        shape, sampling = ways[way]
        asks = [Request(ids[i], max_tokens, sampling, seed + i, stop) for i in batches[number]]
        decoded = decode_batch(model, shape, asks, workers.cancelled.is_set)
        took.append(time.monotonic() - began)
        return decoded

    with wired_limit(model.model):
        items = workers.each(decode, len(work))
        for item, decoded in progress(items, desc="Evaluating", unit="batch", total=len(work)):
            number, way = work[item]
            if decoded is not None:
                found[way] += zip(batches[number], decoded, strict=True)
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
    model: SpeculativeModel,
    shape: DraftShape,
    requests: Sequence[Request],
    cancelled: Callable[[], bool] = lambda: False,
) -> list[Row]:
    """Decode all texts at once, with one draft shape.

    Args:
        cancelled: asked before each step; True ends decoding early.
    """
    engine = model.engine(Fixed(shape), texts=len(requests))
    rows = {engine.submit(request): Row([], [0] * shape.depth) for request in requests}
    while engine.is_busy and not cancelled():
        for emitted in engine.step():
            if emitted.error is not None:
                raise emitted.error
            rows[emitted.number].take(emitted)
    engine.close()
    return list(rows.values())


def _check_model(model: SpeculativeModel, shapes: Sequence[DraftShape]) -> None:
    if model.drafter is None or model.prepare() is None:
        raise ValueError("the model has no drafter: name one to evaluate.")
    for shape in shapes:
        check_shape(shape, model.drafter.config.head_outputs)


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
