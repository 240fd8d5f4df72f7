"""How long a step takes on this machine with each draft shape, timed as the decoding loop runs it."""

import math
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median

import mlx.core as mx
from mlx_lm.generate import wired_limit

from ..decoding.layers import fit_rows
from ..decoding.state import DraftShape, State, begin
from ..models.trial import Telling
from .engine import engine_here
from .loop import bucket
from .policy import StepTimes
from .runner import TRIALS, Runner

SECONDS = 3.0  # that a calibration takes, about
PATIENCE = 2  # at most this many times as long, where the rounds differ much
SLOW = 5.0  # seconds after which hardly any more shapes are tried
LEAST_ROUNDS, MOST_ROUNDS = 2, 15  # in which every shape has its turn
STEADY = 0.3  # spread of a shape's step times, in plain steps, that leaves no doubt; of two or three, a half
SURE = 0.03  # the same, times the root of how many there are, with which no more are wanted
SHORT, LONG = 64, 1024  # tokens of the texts after which steps are timed
BUSY = 1.5  # threads per core that want to run on a machine where no step time is sure
DOUBT = 1.25  # a shape that takes this many times what it can ever emit is not timed further


@dataclass
class Calibration:
    """Step times, whether they leave no doubt, and in how many rounds they were measured."""

    times: StepTimes
    steady: bool
    rounds: int


def calibrate(
    runner: Runner, shapes: Sequence[DraftShape], seconds: float = SECONDS, texts: int = 1
) -> Calibration:
    """Measure every shape after a short text, and how the smallest and the largest grow with the text.

    A slow machine measures few, after a short text only; the others' times are ``guessed``.
    """
    busy = os.getloadavg()[0] > BUSY * (os.cpu_count() or 1)
    tell = Telling("Measuring what a step takes", at_once=True)
    most = max(SLOW, PATIENCE * seconds)
    short = measure(runner, shapes, seconds / 2, SHORT, DOUBT, texts, most, tell)
    if short.cut:
        times = StepTimes(guessed(shapes, short.seconds), [0.0] * len(shapes))
        return Calibration(times, short.steady and not busy, len(short.rounds[0]))
    timed = [shape for shape, times in zip(shapes, short.rounds, strict=True) if times]
    ends = list(dict.fromkeys([shapes[0], max(timed, key=lambda shape: shape.size)]))
    long = measure(runner, ends, seconds / 4, LONG, texts=texts, tell=tell)
    times = between(shapes, short.seconds, dict(zip(ends, long.seconds, strict=True)))
    return Calibration(times, short.steady and long.steady and not busy, len(short.rounds[0]))


def guessed(shapes: Sequence[DraftShape], seconds: Sequence[float]) -> list[float]:
    """Seconds with all shapes, the infinite ones by their nodes, in proportion to the largest that is known.

    The policy learns what they take when it uses them.
    """
    size, most = max((shape.size, x) for shape, x in zip(shapes, seconds, strict=True) if x < math.inf)
    more = (most - seconds[0]) / max(size - 1, 1)
    return [
        x if x < math.inf else seconds[0] + (s.size - 1) * more for s, x in zip(shapes, seconds, strict=True)
    ]


def between(
    shapes: Sequence[DraftShape], short: Sequence[float], long: Mapping[DraftShape, float]
) -> StepTimes:
    """Step times from those after texts of ``SHORT`` and ``LONG`` tokens.

    Each node attends to the text, so what a step takes longer for a longer text grows evenly with its nodes.

    Args:
        shapes: plain decoding first.
        short: seconds with each of them.
        long: seconds with the first and with the largest one that may pay.
    """
    known = dict(zip(shapes, short, strict=True))
    ends = [(shape.size, max(took - known[shape], 0.0) / (LONG - SHORT)) for shape, took in long.items()]
    (least, first), (most, last) = ends[0], ends[-1]
    slope = (last - first) / max(most - least, 1)
    grown = {shape: max(first + slope * (shape.size - least), 0.0) for shape in shapes}  # not -2e-22
    per_row = [grown[shape] if known[shape] < math.inf else 0.0 for shape in shapes]
    return StepTimes([max(a - SHORT * more, a / 2) for a, more in zip(short, per_row, strict=True)], per_row)


@dataclass
class Measured:
    """Step times of a calibration.

    Attributes:
        rounds: for each shape, seconds of one step in each round; the first shape is plain decoding.
            Only doubtful ones take part in the last rounds, and one that can never pay in none.
        cut: whether there was no time for some of them.
    """

    rounds: list[list[float]]
    cut: bool = False

    @property
    def ratios(self) -> list[list[float]]:
        """For each shape, its times in plain steps of the same round."""
        return [[t / plain for t, plain in zip(times, self.rounds[0], strict=False)] for times in self.rounds]

    @property
    def seconds(self) -> list[float]:
        """A step's time with each shape: medians of the ratios, so that a drift of the machine cancels.

        No step is assumed to be faster than a plain one, which does less: that would be an accident.
        """
        plain = median(self.rounds[0])
        return [plain * max(median(ratios), 1.0) if ratios else math.inf for ratios in self.ratios]

    @property
    def doubtful(self) -> list[bool]:
        """For each shape, whether too few of its ratios are close together: not two, or half or less."""
        return [len(x) > 0 and _in_doubt(x) for x in self.ratios]

    @property
    def unsure(self) -> list[bool]:
        """For each shape, whether more of its ratios would tell its time much better."""
        pairs = zip(self.ratios, self.doubtful, strict=True)
        return [is_doubtful or (len(x) > 0 and not _is_sure(x)) for x, is_doubtful in pairs]

    @property
    def steady(self) -> bool:
        """Whether no shape is doubtful."""
        return not any(self.doubtful)


def _in_doubt(ratios: Sequence[float]) -> bool:
    limit = STEADY if len(ratios) > 3 else STEADY / 2
    return len(ratios) < LEAST_ROUNDS or _spread(ratios) > limit * median(ratios)


def _is_sure(ratios: Sequence[float]) -> bool:
    return _spread(ratios) <= SURE * math.sqrt(len(ratios)) * median(ratios)


def _spread(values: Sequence[float]) -> float:
    """Of the closest ones that are more than half of all: the median is one of them, or among them."""
    ordered, most = sorted(values), len(values) // 2
    return min(last - first for first, last in zip(ordered, ordered[most:], strict=False))


def measure(
    runner: Runner,
    shapes: Sequence[DraftShape],
    seconds: float = SECONDS,
    rows: int = SHORT,
    doubt: float = math.inf,
    texts: int = 1,
    most: float = math.inf,
    tell: Callable[[], None] = lambda: None,
) -> Measured:
    """Time steps of every shape in turn, as the decoding loop runs them.

    Args:
        runner: runs the model's steps.
        shapes: to be timed, plain decoding first; the same number of rounds for each.
        seconds: to spend, about; up to ``PATIENCE`` times as many if the rounds differ much.
        rows: tokens of the text before.
        doubt: how many times what it can ever emit a shape may take to be timed further.
        texts: that share each step.
        most: seconds after which one more shape is tried at most.
        tell: called after each step.
    """
    with wired_limit(runner.target.model):
        watch = _Stopwatch(shapes, seconds, doubt, runner.compiled, most)
        engine = engine_here(runner, watch, texts=texts)
        for _ in range(texts):
            engine.resume(after_text(runner, rows), rows)
        while not watch.finished:
            engine.step()
            tell()
        engine.close()
    return watch.measured


def after_text(runner: Runner, rows: int) -> State:
    """The state after a made-up text of ``rows`` tokens, whose keys and values are all zero."""
    target = runner.target
    layers = fit_rows(target.layers_of(target.make_cache())[1], bucket(rows + 1))
    return begin(made_up_text(runner, rows + 1), rows, layers, target.no_context(), mx.random.key(0))


def made_up_text(runner: Runner, rows: int) -> list[int]:
    """``rows`` tokens of the model that hardly repeat."""
    size = runner.target.embed.weight.shape[0]
    return [(7919 * i + i * i // 7 + 13) % size for i in range(rows)]


class _Stopwatch:
    """A policy that times one step of every shape in each round.

    The first round goes from the smallest size on. The loop asks one step ahead; so where no shape of a size
    has come out worth its time yet, a plain step gives it time to, and a slow machine is not kept busy with
    larger ones. Every other round goes backwards, so that a drift of the machine's speed cancels. After the
    first, while there is time, a step is timed only if it follows one of its own shape, as most do in
    decoding: after another shape's it would commit that one's path.

    Args:
        shapes: to be timed, plain decoding first.
        seconds: to spend, about.
        doubt: how many times what it can ever emit a shape may take to be timed further.
        compiled: steps that may be traced are not timed, either.
        most: seconds after which one more shape is tried at most, if one besides plain decoding was.
    """

    def __init__(
        self,
        shapes: Sequence[DraftShape],
        seconds: float,
        doubt: float = math.inf,
        compiled: bool = False,
        most: float = math.inf,
    ) -> None:
        self.measured = Measured([[] for _ in shapes])
        self.finished = False
        self._rounds = dict(zip(shapes, self.measured.rounds, strict=True))
        self._shapes = sorted(shapes, key=lambda shape: shape.size)  # the hopeless ones are taken out
        self._seconds, self._doubt, self._compiled, self._most = seconds, doubt, compiled, most
        self._spent, self._tried = 0.0, False  # whether every shape was
        self._times: defaultdict[DraftShape, list[float]] = defaultdict(list)  # of this round
        self._ahead: deque[bool] = deque()  # whether each step that was chosen, and not observed, is timed
        self._plan = self._steps()

    def choose(self, rows: int = 0, texts: Sequence[int] = ()) -> DraftShape:
        shape, timed = next(self._plan)
        self._ahead.append(timed)
        return shape

    def observe(
        self, shape: DraftShape, ranks: Mapping[int, Sequence[int]], seconds: float, away: float = 0.0
    ) -> None:
        self._spent += seconds
        if self._ahead.popleft():
            self._times[shape].append(seconds)
        if self._tried and all(self._times[shape] for shape in self._shapes):
            for each in self._shapes:
                self._rounds[each].append(median(self._times[each]))
            self._times.clear()
            self.finished = self._enough()

    def _enough(self) -> bool:
        rounds = len(self.measured.rounds[0])
        if rounds < LEAST_ROUNDS:  # which would be measured again at every use, as they are not kept
            return False
        if self._spent > PATIENCE * self._seconds or rounds >= MOST_ROUNDS:
            return True
        if self._spent > self._seconds:  # only what differs is measured once more
            plain, *others = self._shapes
            unsure = dict(zip(self._rounds, self.measured.unsure, strict=True))
            self._shapes = [plain, *(shape for shape in others if unsure[shape])]
        return len(self._shapes) == 1

    def _steps(self) -> Iterator[tuple[DraftShape, bool]]:
        """Shapes, and whether their steps are timed."""
        yield from self._first_round()
        self._tried = True
        order = self._shapes
        while True:
            order = order[::-1]
            for shape in order:
                if shape in self._shapes:  # as is known only now
                    yield from self._turn(shape)

    def _first_round(self) -> Iterator[tuple[DraftShape, bool]]:
        plain, *others = self._shapes
        begun = [plain]
        yield from self._turn(plain, TRIALS + 1)
        for size, group in groupby(others, key=lambda shape: shape.size):
            doubtful = list(group)
            for _ in range(2):  # the first steps may have waited for something that is done once
                for shape in doubtful:
                    if self._spent > self._most and len(begun) > 1:
                        yield from self._cut(begun)
                        return
                    if shape not in begun:
                        begun.append(shape)
                    yield from self._turn(shape, TRIALS + 1)
                if any(self._worth(shape) for shape in doubtful):
                    break
                yield from self._turn(plain)
                doubtful = [shape for shape in doubtful if not self._worth(shape)]
                if not doubtful:
                    break
            else:
                self._shapes = [x for x in self._shapes if x.size <= size and x not in doubtful]
                return

    def _cut(self, begun: list[DraftShape]) -> Iterator[tuple[DraftShape, bool]]:
        """Go on with these shapes and one of the others, so that it is known what more nodes cost."""
        left = [shape for shape in self._shapes if shape not in begun]
        left = [shape for shape in left if shape.width] or left
        if left:
            begun.append(left[len(left) // 2])
            yield from self._turn(begun[-1], TRIALS + 1)
        self.measured.cut = len(begun) < len(self._shapes)
        self._shapes = begun

    def _turn(self, shape: DraftShape, before: int = 1) -> Iterator[tuple[DraftShape, bool]]:
        settles = self._compiled or (self._tried and self._spent <= self._seconds)
        yield from [(shape, False)] * (before if settles else 0)
        yield shape, True

    def _worth(self, shape: DraftShape) -> bool:
        plain = min(self._times[self._shapes[0]])
        return min(self._times[shape], default=math.inf) <= self._doubt * (1 + shape.depth) * plain
