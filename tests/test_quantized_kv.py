"""Quantized keys and values: the same tokens, caches and switch as in mlx-lm, drafted."""

import itertools
import warnings
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache
from models import RandomDrafter, ScriptedDrafter, make_model
from test_engine import finish
from test_stream import Silent

from mlx_redrafter import DraftShape, Sampling, SpeculativeModel, stream_generate
from mlx_redrafter.decoding.layers import Layers, Quantization
from mlx_redrafter.decoding.quantized import quantized
from mlx_redrafter.engine.engine import Engine, Request
from mlx_redrafter.engine.loop import Fixed
from mlx_redrafter.engine.runner import Runner
from mlx_redrafter.models.target import Target

PROMPT = [5, 9, 33, 2, 17, 60, 3]
COUNT = 40
SHAPES = [
    DraftShape(0, 0),
    DraftShape(1, 4),
    DraftShape(4, 3, 9),
    DraftShape(0, 0, None, 3),
    DraftShape(2, 2, 5, 3),
]
STARTS = [0, 3, len(PROMPT) - 1, len(PROMPT), 25, 26, 1000]  # tokens that the layers hold at the switch


def options(bits=8, start=0, size=32):
    return {"kv_bits": bits, "kv_group_size": size, "quantized_kv_start": start}


def plain(model, prompt=PROMPT, count=COUNT, **given):
    return [r.token for r in mlx_lm.stream_generate(model, Silent(), prompt, count, **given)]


@pytest.fixture(scope="module")
def model():
    return make_model("llama3-rope", head_dim=32)


def with_drafters(model, text):
    """The model with a drafter that knows the text, one that guesses, and one that is always wrong."""
    target = Target(model)
    for drafter in (
        ScriptedDrafter(target, text),
        RandomDrafter(target),
        ScriptedDrafter(target, text, shift=1),
    ):
        drafter.config = SimpleNamespace(head_outputs=101, context_layers=())
        yield SpeculativeModel(model, drafter)


def drafters_and_shapes(model, text):
    """Each drafter with each shape that asks it; shapes without beams once."""
    for number, speculative in enumerate(with_drafters(model, text)):
        for shape in SHAPES:
            if shape.width or number == 0:
                yield speculative, shape


def drafted(speculative, shape, prompt=PROMPT, count=COUNT, **given):
    """The responses of a model with a drafter; no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list(stream_generate(speculative, Silent(), prompt, count, shape=shape, **given))
    assert count == 1 or found[-1].steps > 0  # it was drafted for, not decoded plainly
    return found


def said(*args, **given):
    return [r.token for r in drafted(*args, **given)]


@pytest.mark.parametrize(
    ("start", "bits"), [*((start, 4) for start in STARTS), *((25, bits) for bits in (2, 3, 5, 6, 8))]
)
def test_tokens_are_mlx_lms_wherever_the_switch_is(model, start, bits):
    given = options(bits, start)
    expected = plain(model, **given)
    for speculative, shape in drafters_and_shapes(model, PROMPT + expected):
        assert said(speculative, shape, **given) == expected


@pytest.mark.parametrize("start", [2, len(PROMPT), 20, 23])
def test_the_switch_is_at_the_very_token(model, start):
    """Two bits change log-probabilities so much that a switch one token off shows."""

    def logprobs(responses):
        return np.array(mx.stack([r.logprobs for r in responses]))

    here, later = (
        list(mlx_lm.stream_generate(model, Silent(), PROMPT, 25, **options(2, first)))
        for first in (start, max(start, len(PROMPT) - 1) + 1)
    )
    place = max(start - len(PROMPT) + 1, 0)
    assert np.abs(logprobs(here) - logprobs(later))[place].max() > 0.1
    for speculative, shape in drafters_and_shapes(model, PROMPT + [r.token for r in here]):
        found = drafted(speculative, shape, count=25, **options(2, start))
        np.testing.assert_allclose(logprobs(found), logprobs(here), atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_the_switch_in_the_middle_of_a_prompt_is_after_mlx_lms_chunk(model, chunk):
    prompt = list(range(3, 20))
    given = options(2, 7) | {"prefill_step_size": chunk}
    expected = plain(model, prompt, **given)
    assert said(SpeculativeModel(model, None), SHAPES[3], prompt, **given) == expected


@pytest.mark.parametrize("length", [250, 257])
@pytest.mark.parametrize("start", [0, 255, 258])
def test_buffers_that_grow(model, length, start):
    prompt = [7 * i % 101 for i in range(length)]
    given = options(8, start)
    expected = plain(model, prompt, 20, **given)
    for speculative in with_drafters(model, prompt + expected):
        assert said(speculative, SHAPES[4], prompt, 20, **given) == expected


def test_a_good_drafter_still_pays(model):
    given = options(8, 25)
    expected = plain(model, **given)
    text = PROMPT + expected + plain(model, PROMPT + expected, 9)
    found = drafted(next(with_drafters(model, text)), DraftShape(1, 4), **given)
    assert [r.token for r in found] == expected
    assert found[-1].tokens_per_step > 2.5  # a few steps next to the switch are plain


@pytest.mark.parametrize(
    "name", ["llama-mha", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "granite", "mixtral"]
)
def test_other_architectures(name):
    model = make_model(name, head_dim=32, hidden_size=128)
    given = options(4, 20)
    expected = plain(model, **given)
    for speculative in with_drafters(model, PROMPT + expected):
        assert said(speculative, DraftShape(3, 3, 8, 2), **given) == expected


SETTINGS = [None, *(Quantization(b, 32, s) for b, s in [(8, 0), (4, 0), (2, 12), (4, 30), (8, 30), (8, 999)])]


@pytest.fixture(scope="module")
def alone(model):
    """What mlx-lm says to a request: asked once."""
    known = {}

    def say(request):
        kv, key = request.kv, (*request.prompt, request.max_tokens, request.kv)
        given = {} if kv is None else options(kv.bits, kv.start)
        if key not in known:
            known[key] = plain(model, request.prompt, request.max_tokens, prefill_step_size=16, **given)
        return known[key]

    return say


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_texts_of_different_settings_are_as_alone(model, alone, shape, compiled):
    target = Target(model)
    run = Runner(target, RandomDrafter(target), compiled=compiled)
    engine = Engine(run, Fixed(shape), 16, grain=256 if compiled else 1)
    wanted, found = {}, {}
    for i, kv in enumerate(SETTINGS * 2):
        request = Request([(7 * i + j) % 101 for j in range(1 + 9 * i % 41)], 10 + 7 * i % 43, kv=kv)
        wanted[engine.submit(request)] = alone(request)
        for _ in range(i % 3):
            for emitted in engine.step():
                found.setdefault(emitted.number, []).extend(emitted.tokens)
    for number, tokens in finish(engine).items():
        found.setdefault(number, []).extend(tokens)
    assert found == wanted


@pytest.mark.parametrize("compiled", [False, True])
def test_a_seed_gives_the_same_text_alone_and_in_any_company(model, compiled):
    target = Target(model)
    run = Runner(target, RandomDrafter(target), compiled=compiled)
    asks = [([3 + i] * 5, 30, Sampling(0.8), i) for i in range(7)]
    wanted = {}
    for number, (ask, kv) in enumerate(zip(asks, SETTINGS, strict=True), 1):
        engine = Engine(run, Fixed(SHAPES[0]))
        engine.submit(Request(*ask, kv=kv))
        [wanted[number]] = finish(engine).values()
    engine = Engine(run, Fixed(SHAPES[4]))
    for ask, kv in zip(asks, SETTINGS, strict=True):
        engine.submit(Request(*ask, kv=kv))
    assert finish(engine) == wanted


def test_sampling_is_plain_decodings(model):
    speculative = SpeculativeModel(model, None)
    given = {"sampling": Sampling(0.9, top_p=0.95), "seed": 3, "lookup": 3, **options(4, 20)}
    speculative.use_policy(Fixed(SHAPES[3]), 3)
    mine, theirs = (
        [r.token for r in stream_generate(speculative, Silent(), PROMPT, COUNT, draft=draft, **given)]
        for draft in (True, False)
    )
    assert mine == theirs


def test_texts_share_a_batch_once_they_are_kept_alike(model):
    target = Target(model)
    engine = Engine(Runner(target, None), Fixed(SHAPES[0]))
    for start in (12, 18, 999):
        engine.submit(Request([5] * 9, 60, kv=Quantization(4, 32, start)))
    sizes = []
    for _ in range(15):
        engine.step()
        sizes.append(sorted(len(batch.texts) + len(batch._joining) for batch in engine._batches))
    assert [size for size, _ in itertools.groupby(sizes)] == [[3], [1, 2], [1, 2]][:2]
    assert [text.kept is None for batch in engine._batches for text in batch.texts].count(True) == 1


def test_they_take_less_memory(model):
    layers = Layers([[mx.ones((1, 2, 256, 32)) for _ in range(2)] for _ in range(2)])
    size = sum(part.nbytes for rows in layers.rows for part in rows)
    small = quantized(layers, Quantization(8, 32))
    assert sum(part.nbytes for rows in small.rows for part in rows) == size * (8 + 2) // 32  # and 2 x 32 / 32
    target, sizes = Target(model), []
    for kv in (None, Quantization(4, 32, 20)):
        engine = Engine(Runner(target, None), Fixed(SHAPES[3]))
        engine.submit(Request(PROMPT, 99, kv=kv))
        for _ in range(19):
            engine.step()
        sizes.append(engine.nbytes)
    assert sizes[1] == sizes[0] * (4 + 2) // 32


def held(caches):
    return [part[..., : c.offset, :] for c in caches for array in (c.keys, c.values) for part in tuple(array)]


@pytest.mark.parametrize("start", [0, 4, 20, 46, 47, 48, 1000])
def test_the_callers_caches_are_replaced_as_by_mlx_lm(model, start):
    given = options(8, start)
    mine, theirs = make_prompt_cache(model), make_prompt_cache(model)
    prompt = PROMPT
    for _ in range(2):
        expected = plain(model, prompt, prompt_cache=theirs, **given)
        speculative = next(with_drafters(model, PROMPT + expected))
        assert said(speculative, SHAPES[2], prompt, prompt_cache=mine, **given) == expected
        assert [type(c) for c in mine] == [type(c) for c in theirs]
        assert [c.offset for c in mine] == [c.offset for c in theirs]
        if type(mine[0]) is QuantizedKVCache:
            assert all((c.bits, c.group_size) == (8, 32) for c in mine)
        prompt = [8, 1]
    if start == 0:
        for left, right in zip(held(mine), held(theirs), strict=True):
            np.testing.assert_allclose(np.array(left), np.array(right), atol=1e-3)


@pytest.mark.parametrize("given", [{}, options(4, 0)])
def test_a_quantized_cache_of_another_program_is_kept_as_it_is(model, given):
    first, mine, theirs = (
        list(range(30, 50)),
        *([QuantizedKVCache(32, 8) for _ in model.layers] for _ in range(2)),
    )
    for caches in (mine, theirs):
        model(mx.array([first]), cache=caches)
    expected = plain(model, prompt_cache=theirs, **given)
    for speculative in with_drafters(model, first + PROMPT + expected):
        del mine[:]
        mine += [QuantizedKVCache(32, 8) for _ in model.layers]
        model(mx.array([first]), cache=mine)
        assert said(speculative, SHAPES[4], prompt_cache=mine, **given) == expected
        assert [(c.offset, c.bits) for c in mine] == [(c.offset, c.bits) for c in theirs]
    empty = [QuantizedKVCache(32, 8) for _ in model.layers]
    expected = plain(model, [7], prompt_cache=[QuantizedKVCache(32, 8) for _ in model.layers])
    assert said(speculative, SHAPES[4], [7], prompt_cache=empty) == expected


def test_a_text_that_is_left_leaves_its_cache_in_order(model):
    given = options(8, 12)
    expected = plain(model, **given)
    speculative = next(with_drafters(model, PROMPT + expected))
    for count in range(1, 14):
        caches = make_prompt_cache(model)
        stream = stream_generate(
            speculative, Silent(), PROMPT, COUNT, shape=SHAPES[1], prompt_cache=caches, **given
        )
        tokens = [next(stream).token for _ in range(count)]
        stream.close()
        assert tokens == expected[:count]
        assert {c.offset for c in caches} == {len(PROMPT) + count}
        assert {type(c) for c in caches} == {QuantizedKVCache if len(PROMPT) + count >= 12 else KVCache}


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [("gemma3", 32, "window"), ("llama", 64, "64"), ("gemma2", 32, "expand_dims")],
)
def test_what_mlx_lm_cannot_quantize_is_refused_in_one_line(name, size, reason):
    target = Target(make_model(name, head_dim=32))
    engine = Engine(Runner(target, None), Fixed(SHAPES[0]))
    with pytest.raises(ValueError, match=f"cannot be decoded with.*{reason}"):
        engine.submit(Request(PROMPT, 9, kv=Quantization(8, size, 5000)))
    assert not engine.is_busy
