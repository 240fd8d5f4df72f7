"""The policy against brute force, on published cost curves."""

import importlib
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_redrafter.decoding.state import DraftShape
from mlx_redrafter.engine.loop import Fixed
from mlx_redrafter.engine.policy import (
    LOOKUP,
    MOST,
    RANKS,
    SHARE,
    START,
    Policy,
    copied_tokens,
    drafted_tokens,
)

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
curves = importlib.import_module("curves")

PLAIN = DraftShape(0, 0)
SHAPES = [
    PLAIN,
    DraftShape(0, 0, lookup=3),
    DraftShape(1, 1),
    DraftShape(1, 3),
    DraftShape(1, 3, nodes=6, lookup=3),
    DraftShape(3, 3, nodes=8),
    DraftShape(4, 4, nodes=16, lookup=4),
    DraftShape(4, 5, nodes=28, lookup=8),
]
CHIPS = ("m3-max-4bit", "m4-pro-4bit", "m5-max-4bit", "m1-m2-fp16", "cpu-openblas")
DRAFTER = 0.03  # plain steps for each drafted depth


def nodes_of(shape: DraftShape) -> list[tuple[int, int]]:
    """Depths and ranks that a tree of the shape can have below its root."""
    drafted = [(depth, rank) for depth in range(1, shape.length + 1) for rank in range(shape.width)]
    return drafted + [(depth, LOOKUP) for depth in range(1, shape.lookup + 1)]


@dataclass(frozen=True)
class Text:
    """How often the accepted path's node has each rank, or comes from the text itself."""

    first: float
    decay: float
    copied: float
    copied_decay: float = 0.8

    def share(self, depth: int, rank: int) -> float:
        if rank == LOOKUP:
            return self.copied * self.copied_decay ** (depth - 1)
        return self.first * self.decay ** (depth - 1) * (1 + rank) ** -RANKS

    def path(self, coin: float) -> list[int]:
        """Ranks along the accepted path; one coin per step makes all marginals exact, and trees closed."""
        ranks: list[int] = []
        for depth in range(1, 9):
            if coin >= 1 - self.share(depth, LOOKUP):
                ranks.append(LOOKUP)
                continue
            total = 0.0
            for rank in range(8):
                total += self.share(depth, rank)
                if coin < total:
                    ranks.append(rank)
                    break
            else:
                break
        return ranks

    def verified(self, shape: DraftShape) -> set[tuple[int, int]]:
        return set(sorted(nodes_of(shape), key=lambda node: -self.share(*node))[: shape.size - 1])

    def expected(self, shape: DraftShape) -> float:
        return 1 + sum(self.share(*node) for node in self.verified(shape))


HOPELESS = Text(0, 0.5, 0)
SMALL = Text(0.41, 0.42, 0.05)  # the first drafters, about
GOOD = Text(0.55, 0.6, 0.05)
COPY = Text(0.1, 0.3, 0.7, 0.85)


def setting(name: str) -> tuple[list[DraftShape], list[float]]:
    """The shapes that a curve reaches, and what their steps take."""
    cost, most = curves.curve(name), curves.most_rows(name)
    shapes = [shape for shape in SHAPES if shape.size <= most]
    return shapes, [cost(shape.size) + DRAFTER * shape.length for shape in shapes]


class Decoding:
    """Decodes made-up texts with a policy; shapes are chosen one step ahead, as in the loop."""

    def __init__(self, name: str, seed: int = 0, fixed: DraftShape | None = None) -> None:
        self.shapes, self.seconds = setting(name)
        self.policy = Policy(self.shapes, self.seconds) if fixed is None else Fixed(fixed)
        self.random = random.Random(seed)
        self.next = self.policy.choose(0)

    def run(self, text: Text, tokens: int) -> float:
        """Tokens per plain step of time."""
        verified = {shape: text.verified(shape) for shape in self.shapes}
        time, emitted = 0.0, 0
        while emitted < tokens:
            shape, self.next = self.next, self.policy.choose(0)
            ranks = accepted(text.path(self.random.random()), verified[shape])
            self.policy.observe(shape, {1: ranks}, 0.0)
            time += self.seconds[self.shapes.index(shape)]
            emitted += 1 + len(ranks)
        return emitted / time * self.seconds[0]

    def best(self, text: Text) -> float:
        """Tokens per plain step of time with the best fixed shape."""
        rates = (text.expected(s) / t for s, t in zip(self.shapes, self.seconds, strict=True))
        return max(rates) * self.seconds[0]


def accepted(path: list[int], verified: set[tuple[int, int]]) -> list[int]:
    depths = enumerate(path, start=1)
    return path[: next((i for i, node in enumerate(depths) if node not in verified), len(path))]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("text", [SMALL, GOOD, COPY], ids=["small", "good", "copy"])
def test_within_a_few_percent_of_the_best_shape_in_hindsight(chip: str, text: Text) -> None:
    decoding = Decoding(chip)
    decoding.run(text, 300)
    assert decoding.run(text, 1500) >= 0.95 * decoding.best(text)


@pytest.mark.parametrize("chip", CHIPS)
def test_a_hopeless_drafter_is_parked_and_costs_little(chip: str) -> None:
    decoding = Decoding(chip)
    assert decoding.run(HOPELESS, 96) >= 0.97
    assert decoding.run(HOPELESS, 1500) >= 0.985


@pytest.mark.parametrize("chip", ["linear", "cpu-reference-blas"])
@pytest.mark.parametrize("text", [HOPELESS, SMALL, GOOD], ids=["hopeless", "small", "good"])
def test_parks_where_every_row_costs_the_same(chip: str, text: Text) -> None:
    assert Decoding(chip).run(text, 600) >= 0.97


@pytest.mark.parametrize("chip", ["m1-pro-fp16", "cpu-openblas"])
def test_speculation_stops_after_a_few_steps_of_a_wrong_drafter(chip: str) -> None:
    shapes, seconds = setting(chip)
    policy = Policy(shapes, seconds)
    chosen = []
    for _ in range(30):
        chosen.append(policy.choose())
        policy.observe(chosen[-1], {1: []})
    assert chosen[0] != PLAIN  # the first belief is that it may pay
    assert sum(shape != PLAIN for shape in chosen) <= 8
    assert chosen.count(PLAIN) >= 22


@pytest.mark.parametrize("chip", CHIPS)
def test_follows_the_text_when_it_changes(chip: str) -> None:
    """After 600 hopeless tokens, a favourable text is noticed within about a hundred."""
    before, later = [], []
    for seed in range(8):
        decoding = Decoding(chip, seed)
        rate = decoding.run(GOOD, 400)
        before.append(rate / decoding.best(GOOD))
        assert rate >= 0.9 * max(Decoding(chip, seed, shape).run(GOOD, 400) for shape in decoding.shapes)
        assert decoding.run(HOPELESS, 600) >= 0.97
        decoding.run(GOOD, 100)
        later.append(decoding.run(GOOD, 200) / decoding.best(GOOD))
    assert sum(before) / len(before) >= 0.94, before
    assert sum(later) / len(later) >= 0.9, later


@pytest.mark.parametrize("text", [Text(0.4, 0.7, 0), Text(0.6, 0.3, 0.02, 0.9), Text(0.3, 0.9, 0.2, 0.4)])
@pytest.mark.parametrize("chip", CHIPS)
def test_texts_that_the_model_does_not_fit_lose_little(chip: str, text: Text) -> None:
    """Acceptance that falls slower or faster with depth than first guesses say."""
    decoding = Decoding(chip)
    decoding.run(text, 300)
    assert decoding.run(text, 1500) >= 0.88 * decoding.best(text)


def test_wider_shapes_are_found_from_a_narrow_one() -> None:
    """A drafter that is worth more than expected, where second guesses cost nothing."""
    decoding, text = Decoding("m1-m2-fp16"), Text(0.4, 0.7, 0)
    decoding.policy.beliefs.drafts.share = decoding.policy.beliefs.copies.share = 0.0
    wide = {shape for shape in decoding.shapes if shape.width > 1}
    assert max(decoding.shapes, key=decoding.policy.rate) not in wide
    decoding.run(text, 1000)
    assert decoding.policy.current in wide
    assert decoding.run(text, 1000) >= 0.93 * decoding.best(text)


def test_the_model_takes_the_likeliest_nodes() -> None:
    second = 2**-RANKS
    assert drafted_tokens(PLAIN, 0.5) == 0
    assert drafted_tokens(DraftShape(1, 3), 0.5) == 0.5 + 0.25 + 0.125
    assert drafted_tokens(DraftShape(2, 1), 0.5) == pytest.approx(0.5 + 0.5 * second)
    assert drafted_tokens(DraftShape(2, 2, nodes=3), 0.5) == 0.5 + 0.25
    assert drafted_tokens(DraftShape(2, 2, nodes=3), 0.2) == pytest.approx(0.2 + 0.2 * second)
    assert drafted_tokens(DraftShape(0, 0, lookup=3), 0.5) == 0
    assert copied_tokens(DraftShape(1, 3), 0.5) == 0
    assert copied_tokens(DraftShape(1, 3, lookup=3), 0.0625) == 0.0625 * (1 + 0.5 + 0.25)
    assert copied_tokens(DraftShape(1, 3, nodes=3, lookup=3), 0.0625) == 0.0625 * (1 + 0.5)
    assert copied_tokens(DraftShape(0, 0, lookup=1), 0.0625) > 0.0625  # no drafter says the same


def test_expected_never_exceeds_the_depth() -> None:
    policy = Policy(SHAPES, [1.0] * len(SHAPES))
    policy.beliefs.drafts.share = policy.beliefs.copies.share = 1.0
    assert [policy.expected(shape) for shape in SHAPES] == [1 + shape.depth for shape in SHAPES]
    policy.beliefs.drafts.share = policy.beliefs.copies.share = 0.0
    assert [policy.expected(shape) for shape in SHAPES] == [1.0] * len(SHAPES)


@pytest.mark.parametrize("shape", [DraftShape(2, 2, nodes=4, lookup=3), DraftShape(3, 3, nodes=8)])
def test_what_the_shape_in_use_gives_is_believed(shape: DraftShape) -> None:
    """On average, whatever the model makes of it."""
    policy, chance = Policy([PLAIN, shape], [1.0, 1.2]), random.Random(3)
    copy = LOOKUP if shape.lookup else 0
    paths = [[copy] * 3, *[[0]] * 4, *[[0, 0]] * 2, *[[1]] * 2, *[[]] * 3]
    believed = []
    for _ in range(3000):
        policy.observe(shape, {1: chance.choice(paths)})
        believed.append(policy.expected(shape))
    assert sum(believed) / 3000 == pytest.approx(1 + sum(map(len, paths)) / len(paths), rel=0.03)


def test_learns_only_of_what_a_shape_could_have_shown() -> None:
    policy = Policy(SHAPES, [1.0] * len(SHAPES))
    drafts, copies = policy.beliefs.drafts.share, policy.beliefs.copies.share
    policy.observe(DraftShape(1, 3), {1: [0, 0]})
    assert policy.beliefs.drafts.share > drafts and policy.beliefs.copies.share == copies
    drafts = policy.beliefs.drafts.share
    policy.observe(DraftShape(1, 3), {1: []})
    assert policy.beliefs.drafts.share < drafts
    drafts = policy.beliefs.drafts.share
    policy.observe(DraftShape(0, 0, lookup=3), {1: [LOOKUP]})
    assert policy.beliefs.copies.share > copies and policy.beliefs.drafts.share == drafts
    policy.observe(PLAIN, {1: []})
    assert policy.beliefs.drafts.share == drafts
    policy.observe(DraftShape(1, 3, nodes=6, lookup=3), {1: [LOOKUP, LOOKUP]})
    assert policy.beliefs.drafts.share < drafts


def test_what_was_not_seen_for_long_may_have_changed() -> None:
    policy = Policy(SHAPES, [1.0] * len(SHAPES))
    for _ in range(100):
        policy.observe(SHAPES[-1], {1: []})
    before = policy.beliefs.hopes(policy.beliefs)
    for _ in range(100):
        policy.observe(PLAIN, {1: []})
    after = policy.beliefs.hopes(policy.beliefs)
    assert after[0] > before[0] + 0.2 and after[1] > before[1] + 0.1


def test_ties_go_to_plain_decoding() -> None:
    policy = Policy([PLAIN, DraftShape(1, 1)], [1.0, 1.45])  # the first belief: 1.45 tokens per step
    assert policy.rate(DraftShape(1, 1)) == pytest.approx(1)
    policy.debt = 1.0  # no trials
    assert policy.choose() == PLAIN


@pytest.mark.parametrize(
    ("shapes", "seconds"),
    [([], []), ([PLAIN], []), ([DraftShape(1, 1)], [1.0]), ([PLAIN], [0.0]), ([PLAIN], [float("nan")])],
)
def test_refuses_what_it_cannot_use(shapes: list[DraftShape], seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="give"):
        Policy(shapes, seconds)


class Machine(Decoding):
    """Steps take what they take now: plain and speculative ones longer by ``slower``, with noise."""

    def __init__(self, name: str, seed: int = 0, noise: float = 0.2, told: bool = True) -> None:
        super().__init__(name, seed)
        self.noise, self.told, self.slower = noise, told, (1.0, 1.0)
        self.chance, self.used = random.Random(seed + 1000), list[DraftShape]()

    def run(self, text: Text, tokens: int) -> float:
        """Tokens in the time that a plain step takes on average, busy as the machine is."""
        verified = {shape: text.verified(shape) for shape in self.shapes}
        time, emitted, noise = 0.0, 0, self.noise
        while emitted < tokens:
            shape, self.next = self.next, self.policy.choose(0)
            ranks = accepted(text.path(self.random.random()), verified[shape])
            took = self.seconds[self.shapes.index(shape)] * self.slower[shape != PLAIN]
            took *= math.exp(self.chance.gauss(0, noise)) * (3 if self.chance.random() < noise / 10 else 1)
            self.policy.observe(shape, {1: ranks}, took if self.told else 0.0)
            self.used.append(shape)
            time += took
            emitted += 1 + len(ranks)
        plain = self.seconds[0] * self.slower[0] * math.exp(noise**2 / 2) * (1 + noise / 5)
        return emitted / time * plain


@pytest.mark.parametrize("chip", ["m4-pro-4bit", "cpu-openblas"])
def test_noise_in_step_times_costs_nothing(chip: str) -> None:
    texts = [text for text in (SMALL, GOOD, COPY) for _ in range(6)]
    with_times = [Machine(chip, seed).run(text, 800) for seed, text in enumerate(texts)]
    without = [Machine(chip, seed, told=False).run(text, 800) for seed, text in enumerate(texts)]
    assert sum(with_times) >= 0.98 * sum(without)  # of many seeds: 1.00


@pytest.mark.parametrize("slower", [(1.0, 3.0), (1.0, 10.0), (2.0, 10.0)])
@pytest.mark.parametrize("chip", ["m4-pro-4bit", "cpu-openblas"])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_parks_where_speculative_steps_take_longer_and_comes_back(
    chip: str, slower: tuple[float, float], noise: float
) -> None:
    busy, after = [], []
    for seed in range(4):
        machine = Machine(chip, seed, noise)
        quiet = machine.run(GOOD, 300)
        machine.slower, start = slower, len(machine.used)
        machine.run(GOOD, 40)
        assert sum(shape != PLAIN for shape in machine.used[start : start + 20]) <= 5
        busy.append(machine.run(GOOD, 800))  # trials go on
        machine.slower = (1.0, 1.0)
        machine.run(GOOD, 500)
        after.append(machine.run(GOOD, 200) / quiet)
    assert sum(busy) / 4 >= 0.93, busy
    assert sum(after) / 4 >= 0.9, after


@pytest.mark.parametrize("factor", [0.5, 2.0, 5.0])
def test_a_machine_that_is_slower_evenly_decodes_as_before(factor: float) -> None:
    """Heat, another chip's times: ratios are as they were."""
    rates = []
    for seed in range(5):
        quiet, machine = (Machine("m4-pro-4bit", seed, 0.0) for _ in range(2))
        before = dict(machine.policy.cost)
        assert machine.run(GOOD, 300) == quiet.run(GOOD, 300)
        machine.slower = (factor, factor)
        rates.append(machine.run(GOOD, 600) / quiet.run(GOOD, 600))
        for shape, cost in machine.policy.cost.items():
            assert cost == pytest.approx(before[shape], rel=0.35)
    assert sum(rates) / 5 >= 0.95, rates


@pytest.mark.parametrize("odd", [1e4, 3.0, 1e-9, -5.0, 0.0, math.nan, math.inf, -math.inf])
def test_one_odd_step_is_no_reason(odd: float) -> None:
    """The machine slept, or its clock was set."""
    policy = Policy(SHAPES, [1.0] * len(SHAPES))
    for shape in (SHAPES[3], PLAIN):
        for seconds in (1.0, odd, 1.0, 1.0):
            before = policy.purse
            policy.choose()
            paid = policy.purse - before
            policy.observe(shape, {1: []}, seconds)
            assert policy.purse == pytest.approx(before + paid)
    assert policy.cost == dict.fromkeys(SHAPES, 1.0)
    assert set(policy.clock.slower.values()) == {0.0}


def test_time_that_nobody_waited_for_is_not_counted() -> None:
    """A slow reader of the text is no slow machine; but what surely took longer, did."""
    policy = Policy(SHAPES, [1.0] * len(SHAPES))
    for _ in range(20):
        policy.observe(SHAPES[3], {1: []}, 50.0, 49.5)
    assert set(policy.clock.slower.values()) == {0.0}
    for _ in range(4):
        policy.observe(SHAPES[3], {1: []}, 50.0, 45.0)
    assert policy.clock.slower[SHAPES[3]] == pytest.approx(math.log(5.0), abs=0.2)


@settings(max_examples=40, deadline=None)
@given(times=st.lists(st.tuples(st.integers(0, len(SHAPES) - 1), st.floats()), max_size=200))
def test_any_times_are_survived(times: list[tuple[int, float]]) -> None:
    policy = Policy(SHAPES, [1e-9 * 100**i for i in range(len(SHAPES))])
    for place, seconds in times * 5:
        assert policy.choose() in SHAPES
        policy.observe(SHAPES[place], {1: []}, seconds)
    assert all(0 < cost < math.inf for cost in policy.cost.values()) and -2 * MOST <= policy.purse <= 2 * MOST


Oracle = Callable[[DraftShape], list[int]]
costs = st.lists(st.floats(0.5, 20), min_size=len(SHAPES) - 1, max_size=len(SHAPES) - 1)


@settings(max_examples=40, deadline=None)
@given(costs=costs, coins=st.lists(st.integers(0, 2**32), min_size=1, max_size=300), ahead=st.integers(0, 2))
def test_never_much_slower_than_plain_whatever_the_model_says(
    costs: list[float], coins: list[int], ahead: int
) -> None:
    """The promise of the purse, for arbitrary outcomes and step times."""
    policy = Policy(SHAPES, [2.0, *(2 * cost for cost in costs)])
    queue = [policy.choose() for _ in range(ahead)]
    time, emitted = 0.0, 0
    for coin in coins:
        queue.append(policy.choose())
        assert queue[-1] in SHAPES
        shape = queue.pop(0)
        chance = random.Random(coin)
        ranks = [
            chance.choice(
                [*range(shape.width if depth < shape.length else 0), *[LOOKUP] * (shape.lookup > depth)]
            )
            for depth in range(chance.randint(0, shape.depth))
        ]
        policy.observe(shape, {1: ranks})
        time += policy.cost[shape]
        emitted += 1 + len(ranks)
        assert time <= START + emitted + SHARE * (len(coins) + ahead)
        assert 0 <= policy.purse <= MOST + SHARE * (ahead + 1) + 0.5 * (ahead + 1)
        assert policy.debt >= 0
    for shape in SHAPES:
        assert 1 <= policy.expected(shape) <= shape.size
    assert 0 <= policy.beliefs.drafts.share <= 1 and 0 <= policy.beliefs.copies.share <= 1


@settings(max_examples=10, deadline=None)
@given(scale=st.sampled_from([0.25, 4.0, 1024.0]), seed=st.integers(0, 99))
def test_depends_on_ratios_of_times_only_and_on_nothing_hidden(scale: float, seed: int) -> None:
    shapes, seconds = setting("cpu-openblas")
    policies = [Policy(shapes, [scale * value for value in seconds]), Policy(shapes, seconds)]
    chance = random.Random(seed)
    for _ in range(200):
        first, second = (policy.choose() for policy in policies)
        assert first == second
        ranks = accepted(GOOD.path(chance.random()), GOOD.verified(first))
        for policy in policies:
            policy.observe(first, {1: ranks})


def test_published_curves_have_their_sources_and_are_interpolated() -> None:
    data = curves.published()
    for name, entry in data["curves"].items():
        assert entry["source"] and entry["what"]
        assert entry["rows"] == sorted(entry["rows"]) and len(entry["rows"]) == len(entry["time"])
        assert curves.curve(name)(1) == 1
    assert curves.curve("m3-max-4bit")(4) == pytest.approx(1.28, abs=0.01)
    assert curves.curve("m4-pro-4bit")(6) == pytest.approx(1.75 + (2.84 - 1.75) / 3)
    with pytest.raises(ValueError, match="1 to 16"):
        curves.curve("m5-max-4bit")(17)
    with pytest.raises(ValueError, match="choose one of"):
        curves.curve("m9")
