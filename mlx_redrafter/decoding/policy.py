"""Which draft shape the next step uses: the one with the most expected tokens per second.

The accepted path of a step has one node per depth. ``Policy`` keeps, for each depth, how often that node
had each rank of the drafter's beam (or came from the text alone), as a mean that forgets: text changes.
A shape is expected to emit 1 + the sum over all nodes that its trees can have, of which it verifies the
likeliest of each step; so for the shape in use, that is the mean of what it emitted. What its step takes
was measured before. Two accounts, in plain steps of time, keep speculation from costing:

- ``purse``: what speculation may lose against plain decoding. Each speculative step pays in advance for
  the time it takes longer than a plain one, and gets back what it emits. So whatever the model says,
  decoding n tokens never takes longer than ``START + n * (1 + SHARE)`` plain steps.
- ``debt``: what trying other shapes than the current one has lost. It is paid off at ``SHARE`` of the
  time, and while there is debt nothing else is tried, so trials are rare where they cost much, and go on
  where they win.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .step import DraftShape

SHARE = 0.01  # of the time goes into trials that do not pay
START, MOST = 2.0, 8.0  # plain steps in the purse: at first (so that 96 tokens lose 3 % at most), at most
PARK = 0.98  # a draft that promises less than this, against plain decoding, is given up
MARGIN = 1.02  # another shape must promise to be faster by this
LEAST_STEPS = 5.0  # of evidence that a belief stands for: the first one's, and one not renewed for long
DRAFT_STEPS, LOOKUP_STEPS = 50.0, 12.0  # of evidence, at most; repetitions in a text come in bursts
LOOKUP = -1  # stands for the rank of a node that was copied from the text only

Node = tuple[int, int]  # depth from 1, rank in the beam from 0 or LOOKUP


@dataclass
class Belief:
    """How likely one node is on the accepted path: the share of the last ``steps`` steps, about."""

    share: float
    hope: float  # what a good drafter, or a text that repeats itself, would have
    memory: float
    steps: float = LEAST_STEPS

    def learn(self, hit: bool) -> None:
        """Take in a step that could have shown the node."""
        self.steps = min(self.steps + 1, self.memory)
        self.share += (hit - self.share) / self.steps

    def age(self) -> None:
        """Let a step pass that could not: the same belief, on weaker grounds."""
        self.steps = max(self.steps * (1 - 1 / self.memory), LEAST_STEPS)

    def optimistic(self) -> float:
        """What the share may be for all we know."""
        return self.share + max(self.hope - self.share, 0) * LEAST_STEPS / self.steps


class Policy:
    """Chooses draft shapes, learning from what they emit; lives as long as the model is loaded.

    Args:
        shapes: what to choose from; the first one is plain decoding.
        seconds: what one step takes with each of them, behind an empty text.
        per_row: what it takes longer for each token of the text before.

    Raises:
        ValueError: no plain shape first, or a time that is not positive.
    """

    def __init__(
        self, shapes: Sequence[DraftShape], seconds: Sequence[float], per_row: Sequence[float] = ()
    ) -> None:
        if len(shapes) != len(seconds) or not shapes or shapes[0].size != 1:
            raise ValueError(f"{len(shapes)} shapes, {len(seconds)} times: give pairs, plain decoding first.")
        if not all(math.isfinite(value) and value > 0 for value in seconds):
            raise ValueError(f"step times {list(seconds)} are not usable: give positive seconds.")
        if per_row and not (len(per_row) == len(shapes) and all(0 <= x < math.inf for x in per_row)):
            raise ValueError(f"times per row {list(per_row)} are not usable: give one for each shape.")
        growth = per_row or [0.0] * len(shapes)
        self._times = dict(zip(shapes, zip(seconds, growth, strict=True), strict=True))
        self.cost = self._costs(0)  # of a step with each shape, in plain steps
        self.current = self.plain = shapes[0]
        self.beliefs = {node: first_belief(*node) for shape in shapes for node in nodes_of(shape)}
        self.purse, self.debt = START, 0.0
        self.steps, self.tried = 0, dict.fromkeys(shapes, 0)  # when each shape was last chosen

    def choose(self, rows: int = 0) -> DraftShape:
        """The shape of the next step, behind ``rows`` tokens; the last outcome need not be known yet."""
        self.steps += 1
        self.cost = self._costs(rows)
        best = max(self.cost, key=self.rate)
        if self.current != self.plain and self.rate(self.current) <= PARK:
            self.debt = max(self.debt, self.loss(self.current))
            self.current = self.plain
        if self.rate(best) > MARGIN * self.rate(self.current):
            self.current = best
        shape = self._trial() or self.current
        if self.cost[shape] - 1 > self.purse:
            shape = self.plain
        if shape not in (self.current, self.plain):
            self.debt += self.loss(shape)
        self.tried[shape] = self.steps
        self.debt = max(self.debt - SHARE * self.cost[shape], 0)
        self.purse += SHARE if shape == self.plain else 1 - self.cost[shape]
        return shape

    def observe(self, shape: DraftShape, ranks: Sequence[int], seconds: float = 0.0) -> None:
        """Learn from a step with ``shape`` that accepted ``len(ranks)`` drafted tokens.

        Args:
            ranks: of each accepted token in the drafter's beam at its depth; ``LOOKUP`` if not there.
            seconds: that it took; not used, because a calibration's conditions are more alike.
        """
        hits = set(enumerate(ranks, start=1))
        shown = set(nodes_of(shape))
        for node, belief in self.beliefs.items():
            if node in shown:
                belief.learn(node in hits)
            else:
                belief.age()
        self.purse = min(self.purse + len(ranks), MOST)
        if shape not in (self.current, self.plain):
            self.debt = max(self.debt - len(ranks) / self.rate(self.current), 0)
            if len(ranks) > self.loss(shape):
                self.tried[shape] = 0  # a trial that paid is repeated

    def expected(self, shape: DraftShape) -> float:
        """Tokens that a step with ``shape`` is believed to emit."""
        return 1 + min(sum(self.beliefs[node].share for node in nodes_of(shape)), shape.depth)

    def rate(self, shape: DraftShape) -> float:
        """Expected tokens per plain step of time."""
        return self.expected(shape) / self.cost[shape]

    def loss(self, shape: DraftShape) -> float:
        """Plain steps of time lost if a step with ``shape`` accepts nothing, against the current shape."""
        return self.cost[shape] - 1 / self.rate(self.current)

    def _costs(self, rows: int) -> dict[DraftShape, float]:
        times = {shape: seconds + rows * growth for shape, (seconds, growth) in self._times.items()}
        plain = next(iter(times.values()))
        return {shape: time / plain for shape, time in times.items()}

    def _trial(self) -> DraftShape | None:
        """The shape that may beat the current one by the most for what it risks and since it was tried."""
        if self.debt > 0:
            return None
        gains = {shape: self._hoped_rate(shape) - MARGIN * self.rate(self.current) for shape in self.cost}
        may = [s for s in self.cost if s != self.current and gains[s] > 0 and self.cost[s] - 1 <= MOST]
        worth = {s: gains[s] / max(self.loss(s), SHARE) * (self.steps - self.tried[s]) for s in may}
        best = max(worth, key=worth.__getitem__, default=None)
        return best if best is None or self.cost[best] - 1 <= self.purse else None

    def _hoped_rate(self, shape: DraftShape) -> float:
        hoped = sum(self.beliefs[node].optimistic() for node in nodes_of(shape))
        return (1 + min(hoped, shape.depth)) / self.cost[shape]


def nodes_of(shape: DraftShape) -> Iterator[Node]:
    """Every node that a tree of the shape can have below its root."""
    yield from ((depth, rank) for depth in range(1, shape.length + 1) for rank in range(shape.width))
    yield from ((depth, LOOKUP) for depth in range(1, shape.lookup + 1))


def first_belief(depth: int, rank: int) -> Belief:
    """Before anything was seen: a small drafter's acceptance, and that of a good one as the hope."""
    if rank == LOOKUP:
        return Belief(0.10 * 0.65 ** (depth - 1), 0.6 * 0.85 ** (depth - 1), LOOKUP_STEPS)
    beam = (1 + rank) ** -1.7
    return Belief(0.41 * 0.42 ** (depth - 1) * beam, 0.65 * 0.6 ** (depth - 1) * beam, DRAFT_STEPS)
