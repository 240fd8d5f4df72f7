"""Sampling has the model's own distribution: three tokens' joint distribution against enumeration."""

import itertools
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from decoding import before_the_last, everything, start
from hypothesis import given, settings
from hypothesis import strategies as st
from models import RandomDrafter, TableDrafter, make_model
from scipy.stats import chisquare

from mlx_redrafter.decoding import beam
from mlx_redrafter.decoding.filters import filtered
from mlx_redrafter.decoding.sampling import Sampling, draw, filter_settings
from mlx_redrafter.decoding.state import PLAIN, DraftShape, take
from mlx_redrafter.decoding.step import pick, step
from mlx_redrafter.models.target import Target

SIZE = 6  # tokens of the vocabulary
PROMPT = [3, 1, 4, 1, 5, 3, 1]
ROWS = 6000
FILTERS = {
    "none": {},
    "top-p": {"top_p": 0.8},
    "top-k": {"top_k": 3},
    "min-p": {"min_p": 0.15},
    "all": {"top_p": 0.9, "top_k": 4, "min_p": 0.05},
}


@pytest.fixture(scope="module")
def target():
    return Target(make_model("llama", seed=3, vocab_size=SIZE))


@pytest.fixture(scope="module")
def drafters(target):
    return {
        "good": TableDrafter(target, PROMPT, 4),
        "random": RandomDrafter(target),
        "wrong": TableDrafter(target, PROMPT, 4, sign=-1),
    }


def expected(logits, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0):
    """mlx-lm's filters and temperature in NumPy: probabilities of one row [V]."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    keep = np.ones(len(p), bool)
    if 0 < top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        keep[order[before >= top_p]] = False
    if top_k:
        keep[order[top_k:]] = False
    keep &= p >= min_p * p.max()
    q = np.where(keep, p ** (1 / temperature), 0.0)
    return q / q.sum()


def joint(target, **options):
    """Probability of every three tokens after the prompt, [V, V, V]."""
    texts = np.array(list(itertools.product(range(SIZE), repeat=3)))
    ids = mx.array(np.concatenate([np.tile(PROMPT, (len(texts), 1)), texts], axis=1))
    logits = np.array(target.model(ids))[:, len(PROMPT) - 1 : -1].astype(np.float64)
    p = np.stack([[expected(row, **options) for row in rows] for rows in logits])  # [V * V * V, 3, V]
    return np.take_along_axis(p, texts[..., None], axis=-1)[..., 0].prod(axis=1)


def sample(target, drafter, shape, sampling, seed):
    """Three tokens for each of ROWS independent rows, [ROWS, 3], and the drafted tokens accepted."""
    state = take(before_the_last(target, PROMPT), [0] * ROWS, 32)
    first = mx.random.randint(0, 1 << 32, (ROWS, 2), mx.uint32, key=mx.random.key(seed))
    state = replace(state, seeds=first, sampling=filter_settings([sampling] * ROWS, SIZE))
    state, output = step(target, None, pick, PLAIN, state, everything(state))
    rows, accepted = [[t] for t in output.tokens[:, 0].tolist()], 0
    for _ in range(2):  # each step emits one token at least
        state, output = step(target, drafter, pick, shape, state, everything(state))
        for row, tokens, count in zip(rows, output.tokens.tolist(), output.count.tolist(), strict=True):
            row += tokens[:count]
            accepted += count - 1
    return np.array([row[:3] for row in rows]), accepted / ROWS / 2


def check_distribution(tokens, expected):
    counts = np.bincount(tokens @ [SIZE * SIZE, SIZE, 1], minlength=SIZE**3)
    assert counts[expected == 0].sum() == 0  # what a filter drops never comes
    wanted = expected * len(tokens)
    common = wanted >= 5
    counts = np.append(counts[common], counts[~common].sum())
    wanted = np.append(wanted[common], wanted[~common].sum())
    if wanted[-1] < 5:
        counts, wanted = counts[:-1], wanted[:-1] * (counts[:-1].sum() / wanted[:-1].sum())
    assert chisquare(counts, wanted).pvalue > 1e-3


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("quality", ["good", "random", "wrong"])
@pytest.mark.parametrize("width, temperature", [(1, 0.7), (3, 1.3)])
def test_three_tokens_have_the_models_joint_distribution(target, drafters, temperature, name, quality, width):
    options = {"temperature": temperature, **FILTERS[name]}
    shape = DraftShape(width, 2, None if width == 1 else 5)
    tokens, accepted = sample(target, drafters[quality], shape, Sampling(**options), seed=width)
    check_distribution(tokens, joint(target, **options))
    if quality == "good":
        assert accepted > 0.3  # the drafts did matter


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"temperature": 30.0},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_k": 4, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.3},
        {"temperature": 3.0, "min_p": 0.9, "min_tokens_to_keep": 4},
    ],
)
def test_who_knows_the_model_foresees_what_it_samples(target, drafters, options, monkeypatch):
    """The random numbers of a place are known before it is drafted, and so is what filters will drop."""
    monkeypatch.setattr(beam, "TRUST", (0.0,) * 5)  # who knows the model need not copy
    state, shape = take(before_the_last(target, PROMPT), [0] * 500, 32), DraftShape(1, 3)
    seeds = mx.random.randint(0, 1 << 32, (500, 2), mx.uint32, key=mx.random.key(2))
    sampling = filter_settings([Sampling(**options)] * 500, SIZE)
    state = replace(state, seeds=seeds, sampling=sampling)
    state, _ = step(target, None, pick, PLAIN, state, everything(state))
    state, output = step(target, drafters["good"], pick, shape, state, everything(state))
    assert output.count.tolist() == [1 + shape.length] * 500
    assert len(set(map(tuple, output.tokens.tolist()))) > 50 or options == {"temperature": 0.0}


@pytest.mark.parametrize("values", [(3, 3, 2), (1, 4, 3), (2, 3, 4), (1, 3, 3, 2)])
def test_trees_that_end_before_their_drafts_sample_alike(target, drafters, values):
    texts = []
    for shape in (PLAIN, DraftShape(*values)):
        state = start(target, PROMPT, sampling=Sampling(temperature=1.0), seeds=mx.random.key(5))
        tokens = state.token.tolist()
        while len(tokens) < 20:
            state, output = step(target, drafters["random"], pick, shape, state, everything(state))
            tokens += output.tokens[0, : output.count.item()].tolist()
        texts.append(tokens[:20])
    assert texts[0] == texts[1]


def test_a_greedy_text_is_drafted_alike_beside_texts_that_sample(target, drafters):
    drafted = []
    strict = {"top_p": 0.3, "top_k": 2, "min_p": 0.5}
    for others in ([], [Sampling(temperature=1.0)], [Sampling(temperature=1.0, **strict)]):
        state = take(before_the_last(target, PROMPT), [0] * (1 + len(others)), 32)
        state = replace(state, sampling=filter_settings([Sampling(), *others], SIZE))
        _, output = step(target, drafters["random"], pick, DraftShape(2, 2), state, everything(state))
        drafted.append(output.drafted[0].tolist())
    assert drafted[0] == drafted[1] == drafted[2]


@pytest.mark.parametrize("name", ["none", "all"])
@pytest.mark.parametrize(
    "quality, values", [("random", (0, 0, None, 3)), ("random", (1, 2, None, 2)), ("good", (2, 2, 5, 2))]
)
def test_copies_from_the_text_leave_the_distribution_as_it_is(target, drafters, name, quality, values):
    options = {"temperature": 1.0, **FILTERS[name]}
    tokens, accepted = sample(target, drafters[quality], DraftShape(*values), Sampling(**options), seed=7)
    check_distribution(tokens, joint(target, **options))
    assert accepted > 0.02  # some copies were right


def test_a_seed_gives_the_same_text_whatever_is_drafted(target, drafters):
    sampling, texts = Sampling(temperature=1.0, top_k=4), set()
    for values in ((0, 0), (0, 0, None, 3), (1, 2), (3, 2, 5), (2, 2, 6, 2)):
        state = start(target, PROMPT, sampling=sampling, seeds=mx.random.key(4))
        tokens = state.token.tolist()
        while len(tokens) < 30:
            state, output = step(
                target, drafters["random"], pick, DraftShape(*values), state, everything(state)
            )
            tokens += output.tokens[0, : output.count.item()].tolist()
        texts.add(tuple(tokens[:30]))
    assert len(texts) == 1


def test_the_test_notices_a_wrong_distribution(target, drafters):
    tokens, _ = sample(target, drafters["good"], DraftShape(1, 2), Sampling(temperature=0.7), seed=1)
    with pytest.raises(AssertionError):
        check_distribution(tokens, joint(target, temperature=0.8))


def what_passes(sampling, logits):
    """Logits [n, V] after the filters."""
    rows = logits[None].astype(mx.float32)
    rows = rows - rows.max(axis=-1, keepdims=True)
    return filtered(
        rows, mx.zeros((1, len(logits), 2), mx.uint32), filter_settings([sampling], rows.shape[-1])
    )[0]


def drawn(sampling, logits, seed=1):
    """A token for each of the logits [n, V]."""
    seeds = mx.random.randint(0, 1 << 32, (1, len(logits), 2), mx.uint32, key=mx.random.key(seed))
    return draw(logits[None], seeds, filter_settings([sampling], logits.shape[-1]))[0].tolist()


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 20.0])
def test_what_two_passes_tell_is_what_all_tell(spread, temperature):
    options = [
        {"top_p": 0.95},
        {"top_p": 0.3},
        {"top_p": 0.9, "top_k": 5, "min_p": 0.1},
        {"top_p": 0.99, "top_k": 90},
        {"top_p": 0.999, "min_p": 0.5, "min_tokens_to_keep": 3},
        {"top_k": 2},
        {},
    ]
    samplings = [Sampling(temperature=temperature, **each) for each in options] + [Sampling()]
    logits = spread * mx.random.normal((len(samplings), 60, 500), key=mx.random.key(4))
    logits = mx.round(logits * 8) / 8  # with ties
    seeds = mx.random.randint(0, 1 << 32, (len(samplings), 60, 2), mx.uint32, key=mx.random.key(5))
    filters = filter_settings(samplings, 500)
    exact, partly = (np.array(draw(logits, seeds, filters, partly=x)) for x in (False, True))
    known = partly >= 0
    assert known[:, 0].all() and (partly == exact)[known].all()
    assert known[-1].all() and known.mean() > (0.9 if spread == 6 and temperature <= 1 else 0.3)


@pytest.mark.parametrize("options", [*FILTERS.values(), {"top_k": 100}, {"top_p": 0.0}, {"min_p": 1.0}])
def test_filters_are_mlx_lms(options):
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    logits = 2 * mx.random.normal((5, 40), key=mx.random.key(2))
    wanted = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if 0 < options.get("top_p", 1) < 1:
        wanted = apply_top_p(wanted, options["top_p"])
    if options.get("min_p"):
        wanted = apply_min_p(wanted, options["min_p"])
    if 0 < options.get("top_k", 0) < 40:
        wanted = apply_top_k(wanted, options["top_k"])
    wanted = wanted - wanted.max(axis=-1, keepdims=True)
    found = what_passes(Sampling(temperature=1.0, **options), logits)
    np.testing.assert_allclose(np.array(found), np.array(wanted), atol=1e-5)


ROWS_OF = {
    "random": lambda random, size: 3 * random.randn(size),
    "peaked": lambda random, size: 40 * random.randn(size),
    "flat": lambda random, size: np.full(size, random.randn()),
    "nearly flat": lambda random, size: 1e-6 * random.randn(size),
    "ties": lambda random, size: np.round(2 * random.randn(size)),
    "large": lambda random, size: 1e4 + random.randn(size),
    "impossible tokens": lambda random, size: np.where(random.rand(size) < 0.5, -np.inf, random.randn(size)),
}


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(sorted(ROWS_OF)),
    st.sampled_from([3, 40, 128, 1000, 4096]),
    st.one_of(st.sampled_from([0.0, 1e-9, 0.5, 0.9, 1 - 1e-7]), st.floats(0.01, 0.99)),
    st.one_of(st.sampled_from([0, 1, 2, 15, 16, 64, 5000]), st.integers(1, 4096)),
    st.sampled_from([0.0, 0.05]),
    st.integers(0, 1 << 30),
)
def test_filters_keep_what_sorting_in_double_precision_keeps(kind, size, p, k, least, seed):
    random = np.random.RandomState(seed)
    logits = np.stack([ROWS_OF[kind](random, size) for _ in range(2)]).astype(np.float32)
    logits[:, 0] = np.where(np.isfinite(logits[:, 0]), logits[:, 0], 0)  # a token that is possible
    kept = np.array(what_passes(Sampling(1.0, p, k, least), mx.array(logits))) > -np.inf
    for row, keep in zip(logits.astype(np.float64), kept, strict=True):
        weights = np.exp(row - row.max())
        descending = np.sort(row)[::-1]
        masses = np.append(0, np.cumsum(np.sort(weights)[::-1])) / weights.sum()

        def passes(slack, tied, row=row, weights=weights, descending=descending, masses=masses):
            likelier = masses[np.searchsorted(-descending, -row - tied)]
            mass = likelier < p - slack if 0 < p < 1 else True
            rank = row >= descending[min(k or size, size) - 1]
            return mass & rank & (weights >= least * (1 + slack)) & (row > -np.inf)

        assert keep[passes(2e-6, 0)].all()  # by which a sum in float32 may be off
        assert not keep[~passes(-2e-6, 3e-7)].any()  # by which logits of the same probability may differ
        assert keep[row == row.max()].all()
        assert keep[row > row[keep].min() + 3e-7].all()
        assert keep[np.isin(row, row[keep])].all()  # all ties


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-3])
def test_a_temperature_near_zero_is_greedy(temperature):
    logits = mx.random.normal((50, 40), key=mx.random.key(5))
    picks = drawn(Sampling(temperature=temperature, top_k=7), 100 * logits)
    assert picks == mx.argmax(logits, axis=-1).tolist()


def test_an_enormous_temperature_picks_any_token_that_passes():
    logits = 3 * mx.random.normal((1, 40), key=mx.random.key(5))
    picks = drawn(Sampling(temperature=1e300, top_k=7), mx.repeat(logits, 500, axis=0))
    assert set(picks) == set(mx.argsort(-logits[0])[:7].tolist())


@pytest.mark.parametrize(
    "options, word",
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 1.1}, "top-p"),
        ({"top_p": float("nan")}, "top-p"),
        ({"min_p": -1}, "min-p"),
        ({"top_k": -1}, "top-k"),
    ],
)
def test_values_out_of_range_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        Sampling(**options)
