"""Which draft shapes a model may use, and how long a step takes with each on this machine.

Step times are measured at first use, in a second or two, and kept in the cache folder: what decides them
is the chip, the weights (and how they are quantized) and the versions. A damaged file is measured anew, and
so is, at the next use, what was measured while the machine was too busy to tell.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import wired_limit

from . import backend
from .blas import load_blas
from .bundle import identity_of
from .decoding import policy
from .decoding.cache import Cache
from .decoding.loop import GRAIN, Fixed, Policy, bucket, decode, view, with_room
from .decoding.sampling import Sampling
from .decoding.step import DraftShape, State, begin
from .files import atomic_file
from .target import from_prompt_cache

if TYPE_CHECKING:
    from .model import SpeculativeModel

SECONDS = 2.0  # that a calibration takes, about
PATIENCE = 3  # times as long at most, where the rounds differ much
LEAST_ROUNDS, MOST_ROUNDS = 3, 15  # in which every shape has its turn
STEADY = 0.3  # spread of a shape's step times, in plain steps, that leaves no doubt
SHORT, LONG = 64, 2048  # tokens of the texts behind which steps are timed
DOUBT = 1.25  # a shape that takes this many times what it can ever emit is not timed further
UNLIMITED = 1 << 40  # tokens


def make_policy(model: SpeculativeModel, lookup: int | None = None) -> Policy:
    """The policy for a model on this machine; copies at most ``lookup`` tokens per step."""
    shapes = candidates(model, lookup)
    if len(shapes) == 1:
        return Fixed(shapes[0])
    return policy_for(shapes, step_times(model, shapes))


def policy_for(shapes: Sequence[DraftShape], times: StepTimes) -> policy.Policy:
    """The policy that chooses from those shapes that may pay."""
    pays = [i for i, seconds in enumerate(times.seconds) if seconds < math.inf]
    seconds, per_row = ([values[i] for i in pays] for values in (times.seconds, times.per_row))
    return policy.Policy([shapes[i] for i in pays], seconds, per_row)


def candidates(model: SpeculativeModel, lookup: int | None = None) -> list[DraftShape]:
    """The device's shapes that the model can use, plain decoding first.

    Args:
        model: without a drafter, shapes with beams are left out.
        lookup: tokens to be copied from the text per step at most; None: as the device's shapes say.
    """
    known = model.drafter.config.head_outputs if model.drafter else 0
    shapes = [_fit(shape, known, lookup) for shape in backend.current().shapes]
    return list(dict.fromkeys(shape for shape in shapes if shape is not None))


def _fit(shape: DraftShape, known: int, lookup: int | None) -> DraftShape | None:
    """The shape with at most ``known`` beams and ``lookup`` copied tokens; None if it may have no beams."""
    if shape.width and not known:
        return None
    width = min(shape.width, known)
    copied = shape.lookup if lookup is None else min(shape.lookup, lookup)
    nodes = shape.nodes and min(shape.nodes, 1 + width * shape.length + copied)
    return replace(shape, width=width, lookup=copied, nodes=nodes)


@dataclass
class StepTimes:
    """What a step takes with each of some shapes.

    Attributes:
        seconds: behind an empty text; infinite for a shape that can never pay.
        per_row: seconds more for each token of the text before.
    """

    seconds: list[float]
    per_row: list[float]


def step_times(model: SpeculativeModel, shapes: Sequence[DraftShape]) -> StepTimes:
    """What a step takes with each shape: read from the cache folder, or measured now and kept there."""
    found = _read(_file(model, shapes), len(shapes))
    if found is None:
        if sys.stderr is not None and sys.stderr.isatty():
            print("Measuring what a step takes (once for this machine and model) ...", file=sys.stderr)
        short, long = (measure(model, shapes, SECONDS / 2, rows) for rows in (SHORT, LONG))
        found = between(short, long)
        if short.steady and long.steady:
            keep(model, shapes, found)
    return found


def between(short: Measured, long: Measured) -> StepTimes:
    """Step times from those behind texts of ``SHORT`` and ``LONG`` tokens."""
    times = list(zip(short.seconds, long.seconds, strict=True))
    per_row = [max(b - a, 0.0) / (LONG - SHORT) if b < math.inf else 0.0 for a, b in times]
    return StepTimes([a - SHORT * more for (a, _), more in zip(times, per_row, strict=True)], per_row)


def keep(model: SpeculativeModel, shapes: Sequence[DraftShape], times: StepTimes) -> Path | None:
    """Write step times to the cache folder; return the file, or None if it cannot be written."""
    file = _file(model, shapes)
    seconds = [value if value < math.inf else None for value in times.seconds]
    report = {"conditions": conditions(model, shapes), "seconds": seconds, "per_row": times.per_row}
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")
        return file
    return None


@dataclass
class Measured:
    """Step times of a calibration.

    Attributes:
        rounds: for each shape, seconds of one step in each round; the first shape is plain decoding.
            None at all for a shape that can never pay.
    """

    rounds: list[list[float]]

    @property
    def ratios(self) -> list[list[float]]:
        """For each shape, its times in plain steps of the same round."""
        return [[t / plain for t, plain in zip(times, self.rounds[0], strict=False)] for times in self.rounds]

    @property
    def seconds(self) -> list[float]:
        """A step's time with each shape: medians of the ratios, so that a drift of the machine cancels.

        No step is taken to be faster than a plain one, which does less: that would be an accident.
        """
        plain = median(self.rounds[0])
        return [plain * max(median(ratios), 1.0) if ratios else math.inf for ratios in self.ratios]

    @property
    def steady(self) -> bool:
        """Whether there are some rounds, and the middle half of each shape's ratios lies close together."""
        enough = len(self.rounds[0]) >= LEAST_ROUNDS or not any(self.rounds[1:])
        return enough and all(_spread(x) <= STEADY * median(x) for x in self.ratios if x)


def _spread(values: Sequence[float]) -> float:
    """Between the quarter points; between the extremes of a few."""
    ordered, cut = sorted(values), len(values) // 4
    return ordered[-1 - cut] - ordered[cut]


def measure(
    model: SpeculativeModel, shapes: Sequence[DraftShape], seconds: float = SECONDS, rows: int = SHORT
) -> Measured:
    """Time steps of every shape in turn, as the decoding loop runs them.

    Args:
        model: has a target.
        shapes: to be timed, plain decoding first; the same number of rounds for each.
        seconds: to spend, about; up to ``PATIENCE`` times as many if the rounds differ much.
        rows: tokens of the text before.
    """
    with wired_limit(model.model):
        timed = promising(model, shapes, rows)
        watch = _Stopwatch(timed, seconds, measured=Measured([[] for _ in timed]))
        state, run = behind_text(model, rows), model.runner(Sampling())
        grain = max(backend.current().grain, GRAIN)  # so that nothing is compiled on the way
        steps = decode(run, watch, state, rows, UNLIMITED, frozenset(), grain=grain)
        del state
        with contextlib.closing(steps):
            while not watch.finished:
                next(steps)
    rounds = dict(zip(timed, watch.measured.rounds, strict=True))
    return Measured([rounds.get(shape, []) for shape in shapes])


def promising(model: SpeculativeModel, shapes: Sequence[DraftShape], rows: int) -> list[DraftShape]:
    """The shapes without those that cannot pay, because a step takes longer than it can ever emit.

    They are tried from the smallest on, and all that verify more than a hopeless one are hopeless too:
    a slow machine is not kept busy with them.
    """
    state, run, plain = behind_text(model, rows), model.runner(Sampling()), 0.0
    found: list[DraftShape] = []
    for shape in sorted(shapes, key=lambda shape: shape.size):
        for _ in range(2):  # the first one may have to be compiled
            state = with_room(state, rows, shape)
            start = time.perf_counter()
            state, output = run(shape, state, view(state, rows, shape))
            mx.eval(output.tokens, vars(state.cache))
            took, rows = time.perf_counter() - start, rows + shape.depth + 1
        plain = plain or took
        if took > DOUBT * (1 + shape.depth) * plain:
            break
        found.append(shape)
    return [shape for shape in shapes if shape in found]


def behind_text(model: SpeculativeModel, rows: int) -> State:
    """The state behind a made-up text of ``rows`` tokens, whose keys and values are all zero."""
    target = model.target
    assert target is not None
    ids = made_up_text(model, rows)
    caches = target.make_cache()
    logits, context = target.read_prompt(ids[-1:], 1, lambda done, total: None, caches)
    layers = from_prompt_cache(caches)
    keys, values = ([_blank(buffer, rows) for buffer in buffers] for buffers in (layers.keys, layers.values))
    token = mx.argmax(logits, axis=-1).astype(mx.int32)
    return begin(token, context, Cache(keys, values), [ids], [rows], mx.random.key(0))


def made_up_text(model: SpeculativeModel, rows: int) -> list[int]:
    """``rows`` tokens of the model that hardly repeat."""
    target = model.target
    assert target is not None
    size = target.embed.weight.shape[0]
    return [(7919 * i + i * i // 7 + 13) % size for i in range(rows)]


def _blank(buffer: mx.array, rows: int) -> mx.array:
    batch, heads, _, size = buffer.shape
    return mx.zeros((batch, heads, bucket(rows), size), buffer.dtype)


@dataclass
class _Stopwatch:
    """A policy that gives every shape its turn, and times the second of its two steps.

    The first step after a change is not timed: something may have to be compiled or moved for it. Every
    other round goes backwards, so that a drift of the machine's speed cancels.
    """

    shapes: list[DraftShape]
    seconds: float
    finished: bool = False
    measured: Measured = field(default_factory=lambda: Measured([]))
    _chosen: int = 0
    _observed: int = 0
    _spent: float = 0.0

    def choose(self, rows: int = 0) -> DraftShape:
        self._chosen += 1
        return self._turn(self._chosen - 1)

    def observe(self, shape: DraftShape, ranks: Sequence[int], seconds: float) -> None:
        self._spent += seconds
        per_round = 2 * len(self.shapes)
        if self._observed % 2:
            self.measured.rounds[self.shapes.index(shape)].append(seconds)
        self._observed += 1
        if self._observed % per_round == 0:
            self.finished = self._enough(self._spent)

    def _enough(self, spent: float) -> bool:
        rounds = len(self.measured.rounds[0])
        if spent > PATIENCE * self.seconds or rounds >= MOST_ROUNDS:
            return True
        return spent > self.seconds and self.measured.steady

    def _turn(self, step: int) -> DraftShape:
        turn, place = divmod(step // 2, len(self.shapes))
        return self.shapes[place if turn % 2 else -1 - place]


def conditions(model: SpeculativeModel, shapes: Sequence[DraftShape]) -> dict[str, Any]:
    """All that step times depend on, as JSON."""
    blas = load_blas()
    return {
        "chip": backend.chip(),
        "backend": backend.current().name,
        "cores": os.cpu_count(),
        "blas": blas and Path(blas).name,
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "model": identity_of(model.model).embedding_digest,
        "weights": _weights(model.model.parameters()),
        "drafter": None if model.drafter is None else model.drafter.config.to_dict(),
        "drafter_weights": None if model.drafter is None else _weights(model.drafter.weights()),
        "shapes": [list(astuple(shape)) for shape in shapes],
        "versions": {name: metadata.version(name) for name in ("mlx", "mlx-lm", "mlx-redrafter")},
    }


def _weights(parameters: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the weights by their type, which tells quantizations apart."""
    count: Counter[str] = Counter()
    named: Any = tree_flatten(parameters)
    for _, value in named:
        count[str(value.dtype)] += value.nbytes
    return dict(sorted(count.items()))


def _file(model: SpeculativeModel, shapes: Sequence[DraftShape]) -> Path:
    from .model import cache_folder

    text = json.dumps(conditions(model, shapes), sort_keys=True)
    return cache_folder() / "step-times" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _read(file: Path, count: int) -> StepTimes | None:
    """The step times in a file; None if there are none, or not what they should be."""
    try:
        report = json.loads(file.read_text())
        seconds = [math.inf if value is None else float(value) for value in report["seconds"]]
        per_row = [float(value) for value in report["per_row"]]
        usable = all(x > 0 for x in seconds) and all(0 <= x < math.inf for x in per_row)
        if usable and len(seconds) == len(per_row) == count and seconds[0] < math.inf:
            return StepTimes(seconds, per_row)
    except (OSError, ValueError, TypeError, LookupError):
        pass
    return None
