"""Texts kept for reuse: nothing is read twice, nobody's tokens change, and memory stays within its bound."""

import gc
import random

import mlx.core as mx
import numpy as np
import pytest
from models import RandomDrafter, make_model
from test_engine import MIX, SHAPES, plain
from tiny import make_tiny

from mlx_redrafter.decoding.layers import Layers, Quantization
from mlx_redrafter.decoding.state import DraftShape
from mlx_redrafter.engine.engine import Engine, Request
from mlx_redrafter.engine.loop import Fixed
from mlx_redrafter.engine.prefixes import Prefixes
from mlx_redrafter.engine.runner import Runner
from mlx_redrafter.models.target import Target, from_prompt_cache

SYSTEM = [(7 * i) % 101 for i in range(60)]
ROW = 2 * 2 * 2 * 8 * 4  # bytes of a token: layers, keys and values, heads, their size, float32
LIMIT = 1 << 20


@pytest.fixture(scope="module", params=["llama3-rope", "gemma3"])
def model(request):
    return make_model(request.param)


@pytest.fixture
def engine(model):
    return make_engine(model, Prefixes(LIMIT))


def make_engine(model, prefixes=None, shape=SHAPES[2], **options):
    target = Target(model)
    return Engine(Runner(target, RandomDrafter(target)), Fixed(shape), 16, prefixes=prefixes, **options)


def say(engine, *requests):
    """What the requests get, submitted at once."""
    numbers = [engine.submit(request) for request in requests]
    said = {number: [] for number in numbers}
    while engine.is_busy:
        for each in engine.step():
            assert each.error is None
            said[each.number] += each.tokens
    return [said[number] for number in numbers]


def everything(prefixes):
    """All arrays that are kept."""
    pieces, found = [prefixes._root], []
    while pieces:
        piece = pieces.pop()
        pieces += piece.below.values()
        found += [np.array(part) for parts in piece.layers.rows for part in parts]
    return found


def test_what_machines_with_other_layers_do_not_all_keep_is_read(engine):
    """They find it in agreement, each having another part of the model's layers."""
    told, requests = [], [Request([*SYSTEM, end], 6) for end in (1, 1, 2)]
    engine.prefixes.same = lambda count: told.append(count) or len(told) != 2
    first, second, _ = (say(engine, request)[0] for request in requests)
    assert first == second
    assert told == [0, len(SYSTEM), len(SYSTEM)]
    assert [request.cached_tokens for request in requests] == [0, 0, len(SYSTEM)]


@pytest.mark.parametrize(
    "shape, sampling", [(SHAPES[0], MIX[0]), (SHAPES[2], MIX[1]), (SHAPES[2], MIX[7]), (SHAPES[3], MIX[6])]
)
def test_a_conversation_is_the_same_with_and_without(model, shape, sampling):
    kept, anew = make_engine(model, Prefixes(LIMIT), shape), make_engine(model, None, shape)
    text = list(SYSTEM)
    for turn in range(3):
        text += [(31 * turn + i) % 101 for i in range(5)]
        asks = [Request(text, 12, sampling, seed=turn) for _ in range(2)]
        (answer,), (wanted,) = say(kept, asks[0]), say(anew, asks[1])
        assert answer == wanted
        # All that was said before but the last token, which the layers never saw.
        assert asks[0].cached_tokens == (len(text) - 6 if turn else 0)
        assert asks[1].cached_tokens == 0
        text += answer


def test_prompts_that_begin_alike_and_come_at_once_are_read_once(model, engine):
    prompts = [[*SYSTEM, i, *range(40 + i, 50)] for i in range(6)]
    asks = [Request(prompt, 9) for prompt in prompts]
    assert say(engine, *asks) == [plain(model, prompt, 9) for prompt in prompts]
    assert [ask.cached_tokens for ask in asks] == [0] + [60] * 5
    if engine.target.windows == [None, None]:
        rows = 60 + sum(len(prompt) - 60 + 8 for prompt in prompts)
        assert engine.prefixes.nbytes == rows * ROW  # what is common is kept once


def test_random_requests_get_what_each_gets_alone():
    model = make_model("llama3-rope")
    rng, prefixes = random.Random(5), Prefixes(100 * ROW)
    engine = make_engine(model, prefixes, texts=4)
    beginnings = [[rng.randrange(101) for _ in range(n)] for n in (1, 3, 30, 50)]
    wanted, found, hits = {}, {}, 0
    for i in range(20):
        prompt = rng.choice(beginnings)[: rng.randrange(1, 51)] + [rng.randrange(3) for _ in range(i % 4)]
        ask = Request(prompt, rng.randrange(1, 15), MIX[i % 2], seed=i)
        number = engine.submit(ask)
        (wanted[number],) = say(make_engine(model), Request(prompt, ask.max_tokens, MIX[i % 2], seed=i))
        for _ in range(rng.randrange(6)):
            for each in engine.step():
                found.setdefault(each.number, []).extend(each.tokens)
        if rng.random() < 0.2:
            engine.cancel(number)
            wanted[number] = wanted[number][: len(found.get(number, []))]
            found.setdefault(number, [])
        hits += ask.cached_tokens
        assert prefixes.nbytes <= prefixes.limit
    while engine.is_busy:
        for each in engine.step():
            found[each.number] = found.get(each.number, []) + each.tokens
    assert found == wanted
    assert hits > 100


def test_what_is_kept_is_not_written_to(engine):
    say(engine, Request(SYSTEM, 20))
    before = everything(engine.prefixes)
    for end in (10, 59, 60):
        ask = Request([*SYSTEM[:end], 1], 8)
        say(engine, ask)
        assert ask.cached_tokens == end
        now = everything(engine.prefixes)
        held = np.sort(np.concatenate([part.ravel() for part in before]))
        assert np.isin(held, np.concatenate([part.ravel() for part in now])).all()


def test_a_text_that_is_cancelled_is_kept_too(model, engine):
    number = engine.submit(Request(SYSTEM, 50))
    said = [token for _ in range(4) for each in engine.step() for token in each.tokens]
    while not said or len(said) < 6:
        said += [token for each in engine.step() for token in each.tokens]
    engine.cancel(number)
    ask = Request([*SYSTEM, *said, 5], 5)
    assert say(engine, ask) == [plain(model, ask.prompt, 5)]
    assert ask.cached_tokens == len(SYSTEM) + len(said) - 1


def test_checkpoints_are_kept_before_the_prompt_is_read(engine):
    engine.submit(Request([*SYSTEM, *range(90)], 5, checkpoints=(10, 21)))
    engine.step()
    engine.step()
    caches = engine.target.make_cache()
    kept = 32 if any(engine.target.windows) else 21  # rows before a window are kept as soon as they are read
    assert engine.prefixes.restore(SYSTEM, caches) == kept == caches[0].offset
    engine.close()


def test_the_oldest_go_first_and_the_bound_is_kept():
    model = make_model("llama")
    prefixes = Prefixes(100 * ROW)
    engine = make_engine(model, prefixes)
    prompts = [[i] * 31 for i in range(5)]
    for prompt in (*prompts[:3], prompts[0], prompts[3], prompts[4]):
        say(engine, Request(prompt, 1))
        assert prefixes.nbytes <= prefixes.limit
    assert prefixes.nbytes == 93 * ROW
    kept = [prefixes.restore(prompt, engine.target.make_cache()) for prompt in prompts]
    assert kept == [31, 0, 0, 31, 31]
    say(engine, Request([9] * 200, 1))  # does not fit, and costs the others nothing
    assert prefixes.nbytes == 93 * ROW
    prefixes.clear()
    assert prefixes.nbytes == 0 == prefixes.restore(prompts[4], engine.target.make_cache())


def test_memory_is_what_is_kept():
    model = make_model("llama")
    gc.collect()
    prefixes = Prefixes(200 * ROW)
    engine = make_engine(model, prefixes)
    used = []
    for i in range(8):
        say(engine, *(Request([i, *[j] * 50], 3) for j in range(3)))
        mx.clear_cache()
        used.append(mx.get_active_memory() - prefixes.nbytes)
    assert max(used[3:]) - min(used[3:]) < 20_000, used


def test_requests_with_caches_or_quantized_keys_keep_nothing():
    model = make_model("llama", hidden_size=128, head_dim=32)
    engine = make_engine(model, Prefixes(LIMIT))
    say(engine, Request(SYSTEM, 4, kv=Quantization(8, 32, 10)))
    say(engine, Request(SYSTEM, 4, caches=engine.target.make_cache()))
    assert engine.prefixes.nbytes == 0


def test_bounds():
    with pytest.raises(ValueError, match="prompt cache bytes -1 is not usable: give 0"):
        Prefixes(-1)
    engine = make_engine(make_model("llama"), Prefixes(0))
    say(engine, Request(SYSTEM, 4))
    assert engine.prefixes.nbytes == 0 < Prefixes().limit


@pytest.mark.parametrize("name", ["mamba", "qwen3_next", "falcon_h1"])
def test_recurrent_models_say_the_same_with_and_without(name):
    """What is kept stays as it was, though the model writes on in the lists that it was given."""
    runner = Runner(Target(make_tiny(name)), None)
    kept, anew = (
        Engine(runner, Fixed(DraftShape(0, 0, None, 3)), 64, prefixes=prefixes)
        for prefixes in (Prefixes(LIMIT), None)
    )
    text = [token % runner.target.vocabulary for token in 3 * SYSTEM]
    for prompt, known in (
        (text, 0),
        ([*text, 1, 2], 179),
        ([*text[:90], 3], 90),
        ([*text, 1, 4], 181),
        (text, 179),
    ):
        asked = Request(prompt, 12, checkpoints=(90,))
        assert say(kept, asked) == say(anew, Request(prompt, 12))
        assert asked.cached_tokens == known


def test_states_are_found_at_the_end_of_what_was_kept_only():
    model = make_model("llama")
    target, prefixes = Target(model), Prefixes(LIMIT)

    def kept(tokens, value):
        caches = target.make_cache()
        target.forward(mx.array([tokens]), caches)
        layers = Layers(from_prompt_cache(caches).rows, states=[[mx.full((1, 3), value)]])
        prefixes.keep(tokens, layers)

    kept(SYSTEM[:30], 1.0)
    kept([*SYSTEM[:20], 1, 2], 2.0)
    assert prefixes.nbytes == 32 * ROW + 24
    for prompt, wanted in (
        (SYSTEM, 30),
        (SYSTEM[:29], 0),
        ([*SYSTEM[:20], 1, 2, 3], 22),
        (SYSTEM[:20], 0),
    ):
        assert prefixes.restore(prompt, target.make_cache()) == wanted
    kept(SYSTEM[:20], 3.0)
    assert prefixes.restore(SYSTEM[:29], target.make_cache()) == 20
    assert prefixes.nbytes == 32 * ROW + 36
