"""Layers that attend to a window: rings that go round, as long as mlx-lm's, and nobody's tokens change."""

import mlx.core as mx
import numpy as np
import pytest
from decoding import start
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from models import RandomDrafter, ScriptedDrafter, make_model
from test_lossless import WrongDrafter
from test_stream import Silent
from tiny import make_tiny

from mlx_redrafter import SpeculativeModel, stream_generate
from mlx_redrafter.batch_generator import BatchGenerator
from mlx_redrafter.decoding.layers import ROOM, Layers, View, in_order
from mlx_redrafter.decoding.state import DraftShape, begin, with_capacity
from mlx_redrafter.decoding.step import pick, step
from mlx_redrafter.engine.engine import Engine, Request
from mlx_redrafter.engine.loop import Fixed, bucket
from mlx_redrafter.engine.prefix_folder import PrefixFolder
from mlx_redrafter.engine.prefixes import Prefixes
from mlx_redrafter.engine.runner import Runner
from mlx_redrafter.models.target import Target, from_prompt_cache

WINDOW = 24
COUNT = 2 * (WINDOW + ROOM) + 30  # the rings go round twice
PROMPT = [(7 * i * i + 3 * i) % 97 + 1 for i in range(130)]
SHAPES = [
    DraftShape(0, 0),
    DraftShape(1, 4),
    DraftShape(4, 5, 16, 5),
    DraftShape(0, 0, None, 7),
    DraftShape(16, 5, 64, 8),  # more nodes than a ring has room for at first
]


def plain(model, prompt, count=COUNT, **options):
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=count, **options)]


@pytest.fixture(scope="module")
def says(model):
    """``plain``, asked once for what a prompt is gone on with."""
    said = {}

    def say(prompt, count=COUNT):
        if len(said.get(tuple(prompt), ())) < count:
            said[tuple(prompt)] = plain(model, prompt, count)
        return said[tuple(prompt)][:count]

    return say


@pytest.fixture(scope="module", params=["gemma3", "gpt_oss"])
def model(request):
    """Windows of several lengths, with full layers between; and sinks."""
    if request.param == "gpt_oss":
        return make_tiny("gpt_oss")
    return make_model("gemma3", sliding_window=WINDOW, sliding_window_pattern=3)


def drafters(target, shape, length, text):
    """And how many tokens to say with them: good ones, few steps, all; poor ones until a ring goes round."""
    yield ScriptedDrafter(target, text), COUNT
    if shape.width:  # else no drafter is asked
        yield (RandomDrafter(target) if length > WINDOW else WrongDrafter(target, text)), COUNT - length


def finish(engine):
    said = {}
    while engine.is_busy:
        for each in engine.step():
            assert each.error is None
            said.setdefault(each.number, []).extend(each.tokens)
    return said


@pytest.mark.parametrize("length", [3, 130])
@pytest.mark.parametrize("shape", SHAPES)
def test_texts_are_mlx_lms_when_the_rings_go_round(model, says, shape, length):
    prompt = PROMPT[:length]
    wanted, target = says(prompt), Target(model)
    for drafter, count in drafters(target, shape, length, prompt + wanted):
        engine = Engine(Runner(target, drafter), Fixed(shape), 32)
        engine.submit(Request(prompt, count))
        assert finish(engine) == {1: wanted[:count]}


@pytest.mark.parametrize("compiled", [False, True])
def test_texts_of_all_lengths_in_company(model, says, compiled):
    """They join while others' rings have gone round, leave, and bring shapes of other sizes."""
    target = Target(model)

    class Growing:
        chosen = 0

        def choose(self, rows, texts=()):
            self.chosen += 1
            return SHAPES[min(self.chosen // 20, len(SHAPES) - 1)]

        def observe(self, *args):
            pass

    run = Runner(target, RandomDrafter(target), compiled=compiled)
    engine = Engine(run, Growing(), 32, grain=256 if compiled else 1)
    wanted, found = {}, {}
    for i, (length, count) in enumerate([(130, 120), (2, 150), (60, 9), (90, 130), (1, 30)]):
        wanted[engine.submit(Request(PROMPT[:length], count))] = says(PROMPT[:length], count)
        for _ in range(7 * i):
            for each in engine.step():
                found.setdefault(each.number, []).extend(each.tokens)
    for number, tokens in finish(engine).items():
        found.setdefault(number, []).extend(tokens)
    assert found == wanted


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]])
def test_bytes_are_mlx_lms_and_a_little_room(shape):
    model = make_model("gemma3", sliding_window=128, sliding_window_pattern=6, num_hidden_layers=6)
    target = Target(model)
    prompt = [i % 97 for i in range(1000)]
    caches = make_prompt_cache(model)
    plain(model, prompt, 3, prompt_cache=caches)
    theirs = sum(cache.nbytes for cache in caches)
    engine = Engine(Runner(target, RandomDrafter(target)), Fixed(shape))
    engine.submit(Request(prompt, 100))
    for _ in range(12):
        engine.step()
        row = theirs // (5 * 128 + 1024)
        assert engine.nbytes <= theirs + 5 * ROOM * row + 256 * row
    finish(engine)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[2]])
def test_no_step_copies_the_rings_and_the_buffers(shape):
    model = make_model(
        "gemma3", sliding_window=2000, sliding_window_pattern=3, num_hidden_layers=6, head_dim=64
    )
    target = Target(model)
    rows = 8000
    layers = Layers([], windows=target.windows)
    for number in range(6):
        shape_ = (1, 2, layers.size(number, bucket(rows + 200)), 64)
        layers.rows.append([mx.random.normal(shape_) for _ in range(2)])
    size = layers.nbytes
    engine = Engine(Runner(target, RandomDrafter(target)), Fixed(shape))
    state = begin([1, 2, 5, 1, 2, 5], rows, layers, target.no_context(), mx.random.key(0))
    mx.eval(layers.rows, state.history)
    del layers
    engine.resume(state, rows)
    del state
    mx.clear_cache()
    before = mx.get_active_memory() - size
    mx.reset_peak_memory()
    for _ in range(20):
        engine.step()
    assert size < mx.get_peak_memory() - before < 1.2 * size


def test_a_long_answer_is_gone_on_from_at_its_end_or_where_the_window_is_known(model, says):
    target, prefixes = Target(model), Prefixes(1 << 24)
    run = Runner(target, RandomDrafter(target))
    engine = Engine(run, Fixed(SHAPES[1]), 32, prefixes=prefixes)
    wanted = says(PROMPT)
    engine.submit(Request(PROMPT, COUNT))
    assert finish(engine) == {1: wanted}
    text = PROMPT + wanted
    for end, cached in ((len(text) - 1, len(text) - 1), (140, 129), (100, 100)):
        # What was forgotten is known again once it has been read again.
        for known in (cached, end + 1):
            ask = Request([*text[:end], 5, 6], 20)
            number = engine.submit(ask)
            assert finish(engine) == {number: says(ask.prompt, 20)}
            assert ask.cached_tokens == known
            assert prefixes.nbytes == sum(piece.nbytes for piece in pieces(prefixes._root))


def pieces(piece):
    yield piece
    for each in piece.below.values():
        yield from pieces(each)


@pytest.mark.parametrize("count", [1, 20, 150])
def test_the_callers_caches_are_mlx_lms(model, says, count):
    """A second turn goes on from them, here and there, wherever the first was left."""
    speculative = SpeculativeModel(model, None)
    speculative.use_policy(Fixed(SHAPES[3]))
    mine, theirs = make_prompt_cache(model), make_prompt_cache(model)
    first = says(PROMPT)[:count]
    assert plain(model, PROMPT, count, prompt_cache=theirs) == first
    stream = stream_generate(speculative, Silent(), PROMPT, 200, shape=SHAPES[3], prompt_cache=mine)
    assert [next(stream).token for _ in range(count)] == first
    stream.close()
    assert [cache.offset for cache in mine] == [cache.offset for cache in theirs]
    assert [type(cache) for cache in mine] == [type(cache) for cache in theirs]
    wanted = plain(model, [8, 1], 60, prompt_cache=theirs)
    options = {"shape": SHAPES[3], "prompt_cache": mine}
    found = list(stream_generate(speculative, Silent(), [8, 1], 60, **options))
    assert [response.token for response in found] == wanted
    assert found[-1].steps


def test_other_windows_caches_are_refused():
    model = make_model("gemma3", sliding_window=WINDOW)
    engine = Engine(Runner(Target(model), None), Fixed(SHAPES[0]))
    for changes in ((WINDOW + 1, 0), (WINDOW, 4)):
        caches = [
            RotatingKVCache(*changes) if type(cache) is RotatingKVCache else cache
            for cache in make_prompt_cache(model)
        ]
        with pytest.raises(ValueError, match="the caches have other windows than the model"):
            engine.submit(Request(PROMPT, 9, caches=caches))


def test_batch_generator_hands_out_mlx_lms_caches(model, says):
    speculative = SpeculativeModel(model, None)
    speculative.use_policy(Fixed(SHAPES[3]))
    wanted = says(PROMPT, 250)
    said, prompt, caches, before = [], PROMPT, None, []
    for count in (5, 160, 50):  # each goes on from what the one before left
        generator = BatchGenerator(speculative, max_tokens=count)
        assert type(generator) is BatchGenerator
        generator.insert([prompt], caches=[caches], all_tokens=[before])
        while responses := generator.next_generated():
            said.append(responses[0].token)
            last = responses[0]
        assert said == wanted[: len(said)]
        caches, before = last.prompt_cache, [*PROMPT, *said]
        assert {type(a) for a in caches} == {type(b) for b in make_prompt_cache(model)}
        prompt = wanted[len(said) : len(said) + 1]
        said += prompt


def test_rings_hold_what_a_prefill_would_have_left(model, says):
    """After drafts, right and wrong, and with more room."""
    target = Target(model)
    text = PROMPT + says(PROMPT, 60)
    state, count = start(target, PROMPT), 0
    for drafter in (ScriptedDrafter(target, text), RandomDrafter(target)):
        for _ in range(5):
            state, output = step(target, drafter, pick, SHAPES[2], state, View(300))
            count += output.count.item()
    rows = state.rows.item()
    assert rows == len(PROMPT) + count and count > 15
    caches = target.make_cache()
    target.forward(mx.array([text[:rows]]), caches)
    wanted = in_order(from_prompt_cache(caches), rows)
    for room in (ROOM, 100, 3000):  # with the last one, rings are no longer than all buffers
        state = with_capacity(state, 300, room)
        found = in_order(state.layers, rows)
        for mine, theirs, window in zip(found.rows, wanted.rows, found.windows, strict=True):
            cut = slice(rows) if window is None else slice(-window, None)
            for left, right in zip(mine, theirs, strict=True):
                left, right = (np.array(x)[:, :, cut] for x in (left, right))
                assert left.shape[2] == (window or rows)
                np.testing.assert_allclose(left, right, atol=1e-4)


def test_a_folder_keeps_the_texts_whose_rows_are_all_known(model, says, tmp_path):
    """A prompt, and a short answer; of a long one the window is not enough."""
    target = Target(model)
    run = Runner(target, RandomDrafter(target))
    limit = 1 << 24

    def say(prompt, count):
        """With what the disk has alone, as after a restart."""
        folder = PrefixFolder(tmp_path, "0" * 32, limit)
        engine = Engine(run, Fixed(SHAPES[1]), 32, prefixes=Prefixes(limit, folder))
        ask = Request(prompt, count)
        engine.submit(ask)
        ((_, said),) = finish(engine).items()
        folder.flush()
        assert said == says(prompt, count)
        return said, ask.cached_tokens

    said, cached = say(PROMPT, COUNT)
    assert cached == 0
    text = PROMPT + said
    assert say([*text, 5], 9)[1] == len(PROMPT) - 1
    assert say([*text, 5, 6], 9)[1] == len(text) + 1  # it has been read since
    assert say([*text[:70], 5, 6], 9)[1] == 70
