"""Which draft shape the next step of some texts uses: the one with the most expected tokens per second.

Two numbers say what drafts are worth, whatever their shape: how likely the drafter's first guess is right,
and how likely a copy from the text is. What a shape is expected to emit follows from them by a model
(``drafted_tokens``, ``copied_tokens``), so each step teaches something of all shapes. Both are means that
forget, as text changes. What a step takes was measured before, and is corrected by what steps take now
(``Clock``). Two accounts, in plain steps of time, keep speculation from costing:

- ``purse``: what speculation may lose against plain decoding. Each speculative step pays in advance for
  the time it takes longer than a plain one, and gets back what it emits. So whatever the model says,
  decoding n tokens never takes longer than ``START + n * (1 + SHARE)`` plain steps. Where steps turn out to
  take longer than was believed, it pays for that too; what it owes then is paid off at ``BUSY`` of the time.
- ``debt``: what trying other shapes than the current one has lost. It is paid off at ``SHARE`` of the
  time, and while there is debt nothing else is tried, so trials are rare where they cost much, and go on
  where they win.

Texts that share steps each have their own beliefs, and what a shape emits is the mean over them; a plain step
is then one of all of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..decoding.state import PLAIN, DraftShape

SHARE = 0.01  # of the time goes into trials that do not pay
START, MOST = 2.0, 8.0  # plain steps in the purse: at first (so that 96 tokens lose 3 % at most), at most
PARK = 0.98  # a draft that promises less than this, against plain decoding, is given up
MARGIN = 1.02  # another shape must promise to be faster by this
LEAST_STEPS = 5.0  # of evidence that a belief stands for: the first one's, and one not renewed for long
DRAFT_STEPS, LOOKUP_STEPS = 30.0, 12.0  # of evidence, at most; repetitions in a text come in bursts
SHARES = np.linspace(0, 1, 51)  # for which the model is computed; between them it is interpolated
RANKS = 1.4  # the r-th guess is right r ** RANKS times less often than the first one
COPIES = 0.25  # a copied token after a right one is right as often as the first one to this power
ALONE = 1.25  # as many copies are accepted where no drafter guesses some of the same tokens
BUSY = 0.025  # of the time goes into finding out whether a busy machine is quiet again
AGAIN = 100  # steps after which a plain one is timed again; also after one that was odd:
ODD, ODD_PLAIN = math.log(2.5), 0.35  # a speculative step, a plain one that is off by this (logarithms)
MOVED = 0.4  # what was learned of speculative ones since the last plain one
NOISE, FAR = 0.1, math.log(32)  # steps differ by as much anyway; are not believed to differ by more
KIN = 0.8  # of what one shape's steps take longer, others' are assumed to take longer too
FADE = 64.0  # steps of one shape in which others, if not seen, are assumed to have become as slow
SLEPT = 600.0  # seconds that no step takes on a machine that is awake
MEASURED = (1, 4, 16)  # texts that share steps
LOOKUP = -1  # stands for the rank of a token that was copied from the text only


@dataclass
class Belief:
    """How often a kind of draft is right, about over the last ``steps`` steps."""

    share: float
    hope: float  # what a good drafter, or a text that repeats itself, would have
    memory: float
    steps: float = LEAST_STEPS

    def learn(self, accepted: int, tokens: np.ndarray) -> None:
        """Take in a step that accepted so many drafts, where ``tokens`` are expected for each of SHARES."""
        self.steps = min(self.steps + 1, self.memory)
        before = np.interp(self.share, SHARES, tokens)
        self.share = float(np.interp(before + (accepted - before) / self.steps, tokens, SHARES))

    def age(self) -> None:
        """Let a step pass that had no such drafts: the same belief, on weaker grounds."""
        self.steps = max(self.steps * (1 - 1 / self.memory), LEAST_STEPS)

    def hoped(self, share: float) -> float:
        """As much above ``share`` as the evidence leaves room for."""
        return share + max(self.hope - share, 0) * LEAST_STEPS / self.steps


class Beliefs:
    """What is known of texts' drafts: of each text that is decoded, and of a new one."""

    def __init__(self) -> None:
        self.drafts = Belief(0.45, 0.65, DRAFT_STEPS)  # before anything was seen: a small drafter's
        self.copies = Belief(0.10, 0.4, LOOKUP_STEPS)
        self._own: dict[int, Beliefs] = {}

    def of(self, texts: Sequence[int]) -> list[Beliefs]:
        """The texts' own beliefs. One text alone has the general ones, which follow text after text."""
        if len(texts) < 2:
            return [self]
        self._own = {number: self._own.get(number) or self._copy() for number in texts}
        return list(self._own.values())

    def _copy(self) -> Beliefs:
        new = Beliefs()
        new.drafts, new.copies = replace(self.drafts), replace(self.copies)
        return new

    def shares(self, general: Beliefs) -> tuple[float, float]:
        """How often drafts and copies are right; the more this text has said, the less the others count."""
        pairs = (self.drafts, general.drafts), (self.copies, general.copies)
        drafts, copies = (
            own.share + (all_.share - own.share) * LEAST_STEPS / own.steps for own, all_ in pairs
        )
        return drafts, copies

    def hopes(self, general: Beliefs) -> tuple[float, float]:
        """What ``shares`` may be for all we know; all texts have the drafter in common."""
        drafts, copies = self.shares(general)
        return min(self.drafts.hoped(drafts), general.drafts.hoped(drafts)), self.copies.hoped(copies)

    def learn(
        self, shape: DraftShape, accepted: tuple[int, int], tables: tuple[np.ndarray, np.ndarray]
    ) -> None:
        """Take in a step that accepted so many drafted and copied tokens; ``tables`` say what is expected."""
        for belief, can, right, expected in zip(
            (self.drafts, self.copies), (shape.width, shape.lookup), accepted, tables, strict=True
        ):
            if can:
                belief.learn(right, expected)
            else:
                belief.age()


class Clock:
    """How much longer steps take than was measured, in logarithms.

    A step counts as far as the one before it of its kind (plain or speculative) says the same, and small
    differences count little: noise. What slows plain steps down is believed to slow down all, but where
    speculative ones ran just before, it is known of those already.
    """

    def __init__(self, shapes: Sequence[DraftShape]) -> None:
        self.slower = dict.fromkeys(shapes, 0.0)
        self._last = {True: 0.0, False: 0.0}  # how much longer the last plain, speculative step took
        self._plain_steps, self._moved = 0, 0.0  # in a row; what was learned of others since the last one

    def learn(self, shape: DraftShape, believed: float, least: float, most: float) -> tuple[float, bool]:
        """Take in a step that took between ``least`` and ``most`` seconds.

        Returns by how much it surely differed from what was ``believed``, and whether it was odd.
        """
        plain, now = shape.size == 1, self.slower[shape]
        off = min(max(math.log(min(max(believed, least), most) / believed), -FAR), FAR)
        sure = sorted((0.0, off, self._last[plain] - now))[1]
        move = max(abs(sure) - NOISE, 0) * math.copysign(min(abs(sure), 1), sure)
        self._last[plain] = now + off
        self._plain_steps = self._plain_steps + 1 if plain else 0
        self._moved = 0.0 if plain else self._moved + move
        self.slower[shape] += move
        for other in (other for other in self.slower if other.size > 1 and other != shape):
            alike = KIN if not plain else self._plain_steps > LEAST_STEPS
            self.slower[other] += alike * move
            self.slower[other] += (self.slower[shape] - self.slower[other]) / FADE
        return sure, abs(off - move) > (ODD_PLAIN if plain else ODD) or abs(self._moved) > MOVED


class Policy:
    """Chooses draft shapes, learning from what they emit; lives as long as the model is loaded.

    Args:
        shapes: what to choose from; the first one is plain decoding.
        seconds: what one step takes with each of them, after an empty text.
        per_row: what it takes longer for each token of the text before.
        beliefs: what is known of the texts, if other policies know it too.

    Raises:
        ValueError: no plain shape first, or a time that is not positive.
    """

    def __init__(
        self,
        shapes: Sequence[DraftShape],
        seconds: Sequence[float],
        per_row: Sequence[float] = (),
        beliefs: Beliefs | None = None,
    ) -> None:
        if len(shapes) != len(seconds) or not shapes or shapes[0].size != 1:
            raise ValueError(f"{len(shapes)} shapes, {len(seconds)} times: give pairs, plain decoding first.")
        if not all(math.isfinite(value) and value > 0 for value in seconds):
            raise ValueError(f"step times {list(seconds)} are not usable: give positive seconds.")
        if per_row and not (len(per_row) == len(shapes) and all(0 <= x < math.inf for x in per_row)):
            raise ValueError(f"times per row {list(per_row)} are not usable: give one for each shape.")
        growth = per_row or [0.0] * len(shapes)
        self._times = dict(zip(shapes, zip(seconds, growth, strict=True), strict=True))
        self.current = self.plain = shapes[0]
        self.clock, self._odd = Clock(shapes), False  # whether a plain step should be timed
        self.cost = self._costs(0)  # of a step with each shape, in plain steps
        self.beliefs = beliefs or Beliefs()
        self._present = [self.beliefs]  # of the texts that share a step
        tables = [
            [[count(shape, x) for x in SHARES] for shape in shapes]
            for count in (drafted_tokens, copied_tokens)
        ]
        self._tables = np.array(tables)  # [2, shapes, SHARES]: drafted and copied tokens of a step
        self._depths = np.array([[shape.depth] for shape in shapes])
        self._shares = list[tuple[float, float]]()  # for which this is ``expected`` of each shape:
        self._expected = dict[DraftShape, float]()
        self.purse, self.debt = START, 0.0
        self.steps, self.tried = 0, dict.fromkeys(shapes, 0)  # when each shape was last chosen

    def choose(self, rows: int = 0, texts: Sequence[int] = ()) -> DraftShape:
        """The shape of the next step, after ``rows`` tokens; the last outcome need not be known yet."""
        self.steps += 1
        self._present = self.beliefs.of(texts)
        self.cost = self._costs(rows)
        best = max(self.cost, key=self.rate)
        if self.current != self.plain and self.rate(self.current) <= PARK:
            self.debt = max(self.debt, self.loss(self.current))
            self.current = self.plain
        if self.rate(best) > MARGIN * self.rate(self.current):
            self.current = best
        shape = self._trial() or self.current
        odd = self._odd or self.steps - self.tried[self.plain] > AGAIN
        if self.cost[shape] - 1 > self.purse or odd:
            shape, self._odd = self.plain, False
        if shape not in (self.current, self.plain):
            self.debt += self.loss(shape)
        self.tried[shape] = self.steps
        self.debt = max(self.debt - SHARE * self.cost[shape], 0)
        spare = SHARE if self.purse >= 0 else BUSY
        self.purse += spare if shape == self.plain else 1 - self.cost[shape]
        return shape

    def observe(
        self, shape: DraftShape, ranks: Mapping[int, Sequence[int]], seconds: float = 0, away: float = 0
    ) -> None:
        """Learn from a step with ``shape``.

        Args:
            ranks: for each text, and each drafted token that it accepted, the beam it came from at its depth;
                ``LOOKUP`` if it was copied.
            seconds: that it took; 0 if that is not known.
            away: seconds less that it may have taken, in which nobody waited for it.
        """
        if 1e-9 < seconds < SLEPT:
            sure, self._odd = self.clock.learn(shape, self._seconds(shape), seconds - away, seconds)
            if shape != self.plain:
                more = self.cost[shape] * math.expm1(sure)  # than was paid in advance
                self.purse = max(self.purse - more, -2 * MOST)
            elif sure > ODD_PLAIN:
                self.purse = max(self.purse, 0.0)  # all steps take longer: nothing was lost
        tables = self._tables[:, list(self._times).index(shape)]
        for own, each in zip(self.beliefs.of(list(ranks)), ranks.values(), strict=True):
            copied = sum(rank == LOOKUP for rank in each)
            found = (len(each) - copied, copied), (tables[0], tables[1])
            for beliefs in {own, self.beliefs}:
                beliefs.learn(shape, *found)
        accepted = sum(map(len, ranks.values())) / max(len(ranks), 1)
        self.purse = min(self.purse + accepted, MOST)
        if shape not in (self.current, self.plain):
            self.debt = max(self.debt - accepted / self.rate(self.current), 0)
            if accepted > self.loss(shape):
                self.tried[shape] = 0  # a trial that paid is repeated

    def expected(self, shape: DraftShape) -> float:
        """Tokens that a step with ``shape`` is expected to emit for each text."""
        shares = [each.shares(self.beliefs) for each in self._present]
        if shares != self._shares:
            self._shares, self._expected = shares, self._tokens(shares)
        return self._expected[shape]

    def rate(self, shape: DraftShape) -> float:
        """Expected tokens per plain step of time."""
        return self.expected(shape) / self.cost[shape]

    def loss(self, shape: DraftShape) -> float:
        """Plain steps of time lost if a step with ``shape`` accepts nothing, against the current shape."""
        return self.cost[shape] - 1 / self.rate(self.current)

    def _costs(self, rows: int) -> dict[DraftShape, float]:
        self._rows = rows
        times = {shape: self._seconds(shape) for shape in self._times}
        return {shape: time / times[self.plain] for shape, time in times.items()}

    def _seconds(self, shape: DraftShape) -> float:
        """What a step is expected to take now."""
        seconds, growth = self._times[shape]
        return (seconds + self._rows * growth) * math.exp(self.clock.slower[shape])

    def _trial(self) -> DraftShape | None:
        """The shape that may beat the current one by the most for what it risks and since it was tried."""
        if self.debt > 0:
            return None
        hoped = self._tokens([each.hopes(self.beliefs) for each in self._present])
        least = MARGIN * self.rate(self.current)
        gains = {shape: hoped[shape] / cost - least for shape, cost in self.cost.items()}
        may = [s for s in self.cost if s != self.current and gains[s] > 0 and self.cost[s] - 1 <= MOST]
        worth = {s: gains[s] / max(self.loss(s), SHARE) * (self.steps - self.tried[s]) for s in may}
        best = max(worth, key=worth.__getitem__, default=None)
        return best if best is None or self.cost[best] - 1 <= self.purse else None

    def _tokens(self, shares: Sequence[tuple[float, float]]) -> dict[DraftShape, float]:
        """Expected tokens of a step with each shape, the mean over texts with these ``shares``."""
        place = np.array(shares).T * (len(SHARES) - 1)  # [2, B]
        below = np.minimum(place.astype(int), len(SHARES) - 2)
        kinds = zip(self._tables, below, place - below, strict=True)
        # Each [shapes, B].
        drafted, copied = (table[:, i] * (1 - part) + table[:, i + 1] * part for table, i, part in kinds)
        tokens = 1 + np.minimum(drafted + copied, self._depths)
        return dict(zip(self._times, tokens.mean(axis=1).tolist(), strict=True))


def reason(error: Exception) -> str:
    """Why there is no policy."""
    return f"step times cannot be measured ({type(error).__name__}: {error})"


@dataclass
class StepTimes:
    """What a step takes with each of some shapes.

    Attributes:
        seconds: after an empty text; infinite for a shape that can never pay.
        per_row: seconds more for each token of the text before.
    """

    seconds: list[float]
    per_row: list[float]


def policy_for(shapes: Sequence[DraftShape], times: StepTimes, beliefs: Beliefs | None = None) -> Policy:
    """The policy that chooses from those shapes that may pay."""
    pays = [i for i, seconds in enumerate(times.seconds) if seconds < math.inf]
    seconds, per_row = ([values[i] for i in pays] for values in (times.seconds, times.per_row))
    return Policy([shapes[i] for i in pays], seconds, per_row, beliefs)


def times_for(measured: Callable[[int], StepTimes], texts: int) -> StepTimes:
    """What a step of so many texts takes: measured for ``MEASURED`` numbers, interpolated between them."""
    below = max(number for number in MEASURED if number <= texts)
    above = min((number for number in MEASURED if number >= texts), default=below)
    first, last = measured(below), measured(above)
    if above == below:  # beyond the largest, in proportion
        return StepTimes(*([x * texts / below for x in values] for values in (first.seconds, first.per_row)))
    part = (texts - below) / (above - below)
    pairs = ((first.seconds, last.seconds), (first.per_row, last.per_row))
    return StepTimes(*([a + part * (b - a) for a, b in zip(*pair, strict=True)] for pair in pairs))


class Policies:
    """A policy for each number of texts that share a step, made when it is first needed.

    Args:
        make: the policy for a number of texts, given what is known of texts.
    """

    def __init__(self, make: Callable[[int, Beliefs], Policy]) -> None:
        self.beliefs = Beliefs()
        self._make, self._made = make, dict[int, Policy]()

    def of(self, texts: int) -> Policy:
        """The policy for so many texts; for several, plain decoding if none can be made."""
        if texts not in self._made:
            try:
                self._made[texts] = self._make(texts, self.beliefs)
            except Exception as error:
                if texts == 1:
                    raise
                warnings.warn(f"{reason(error)}: decoding {texts} texts plainly.", stacklevel=2)
                self._made[texts] = Policy([PLAIN], [1.0], beliefs=self.beliefs)
        return self._made[texts]

    def choose(self, rows: int = 0, texts: Sequence[int] = (1,)) -> DraftShape:
        """As ``Policy.choose``."""
        return self.of(len(texts)).choose(rows, texts)

    def observe(
        self, shape: DraftShape, ranks: Mapping[int, Sequence[int]], seconds: float = 0, away: float = 0
    ) -> None:
        """As ``Policy.observe``."""
        policy = self.of(len(ranks))
        if shape in policy.cost:  # it may be hopeless for so many, after a step that others had left
            policy.observe(shape, ranks, seconds, away)


def drafted_tokens(shape: DraftShape, share: float) -> float:
    """Drafted tokens that a step is expected to accept, if the drafter's first guess is right so often.

    A node is accepted as often as first guesses are right all the way down to its depth, and the r-th guess
    there r ** RANKS times less; trees take the likeliest nodes. For each of three drafters, the shares that
    explain what was accepted with 4, 8 and 16 nodes differ by 0.011 at most (docs/log.md).
    """
    depths = [share**depth for depth in range(1, shape.length + 1)]
    nodes = [depth * rank**-RANKS for depth in depths for rank in range(1, shape.width + 1)]
    return math.fsum(sorted(nodes, reverse=True)[: shape.size - 1])


def copied_tokens(shape: DraftShape, share: float) -> float:
    """Copied tokens that a step is expected to accept, if the first one is right so often."""
    rate = share if shape.width else share * ALONE
    return rate * math.fsum(share ** (COPIES * depth) for depth in range(min(shape.lookup, shape.depth)))
