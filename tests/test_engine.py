"""Several texts at once: each one's tokens are those that it has alone, whoever comes and goes."""

import importlib
import random
from pathlib import Path

import mlx_lm
import pytest
from decoding import before_the_last
from models import RandomDrafter, make_model
from test_stream import Silent

from mlx_redrafter.decoding.sampling import Sampling
from mlx_redrafter.decoding.state import DraftShape
from mlx_redrafter.engine.engine import Engine, Request
from mlx_redrafter.engine.loop import Batch, Fixed, Text, bucket
from mlx_redrafter.engine.runner import Runner
from mlx_redrafter.models.target import Target

SHAPES = [DraftShape(0, 0), DraftShape(1, 3), DraftShape(2, 3, 5, 4), DraftShape(0, 0, None, 3)]


def plain(model, prompt, count, **options):
    return [r.token for r in mlx_lm.stream_generate(model, Silent(), prompt, count, **options)]


def finish(engine):
    texts = {}
    while engine.is_busy:
        for emitted in engine.step():
            texts.setdefault(emitted.number, []).extend(emitted.tokens)
    return texts


@pytest.fixture(scope="module")
def model():
    return make_model("llama3-rope")


def prompts(count, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(101) for _ in range(rng.choice((1, 2, 9, 40)))] for _ in range(count)]


def check_while_texts_come_and_go(engine, model, texts, least):
    """Each text joins after as many steps as there are others, and says what it says alone."""
    wanted, found = {}, {}
    for i, prompt in enumerate(prompts(texts)):
        count = least + 6 * i % 23
        wanted[engine.submit(Request(prompt, count))] = plain(model, prompt, count)
        for _ in range(i):
            for emitted in engine.step():
                found.setdefault(emitted.number, []).extend(emitted.tokens)
    for number, tokens in finish(engine).items():
        found.setdefault(number, []).extend(tokens)
    assert found == wanted


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_is_plain_decoding_while_texts_come_and_go(model, shape, compiled):
    target = Target(model)
    run = Runner(target, RandomDrafter(target), compiled=compiled)
    engine = Engine(run, Fixed(shape), 16, texts=4, eager=compiled)
    check_while_texts_come_and_go(engine, model, 7, 5)


MIX = [
    Sampling(),
    Sampling(0.8),
    Sampling(1.2, top_p=0.9),
    Sampling(1.0, top_k=5),
    Sampling(1.0, min_p=0.1, min_tokens_to_keep=3),
    Sampling(1.0, xtc_probability=0.5, xtc_threshold=0.1, xtc_special_tokens=(3,)),
    Sampling(repetition_penalty=1.3),
    Sampling(0.7, presence_penalty=0.5, frequency_penalty=0.3, frequency_context_size=7),
    Sampling(logit_bias=((5, 3.0), (9, -100.0))),
]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_seed_gives_the_same_text_alone_and_in_any_company(model, compiled):
    target = Target(model)
    run = Runner(target, RandomDrafter(target), compiled=compiled)
    asks = [Request(p, 12 + i, MIX[i % 9], seed=i) for i, p in enumerate(prompts(14, 1))]
    alone = []
    for shape, ask in zip(SHAPES * 4, asks, strict=False):
        engine = Engine(run, Fixed(shape))
        engine.submit(ask)
        alone += finish(engine).values()
    engine = Engine(
        run, Fixed(SHAPES[2]), 16, texts=5, padded=lambda n: 1 << (n - 1).bit_length(), eager=compiled
    )
    numbers = [engine.submit(ask) for ask in asks]
    together = finish(engine)
    assert [together[number] for number in numbers] == alone


PENALTIES = [
    {"repetition_penalty": 1.7},
    {"presence_penalty": 3.0, "presence_context_size": 5},
    {"frequency_penalty": 2.0},
    {"logit_bias": {5: 4.0, 7: -50.0}},
    {"repetition_penalty": 1.2, "presence_penalty": 1.0, "frequency_penalty": 1.0, "logit_bias": {1: 2.0}},
]


@pytest.mark.parametrize("options", PENALTIES, ids=str)
@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_penalties_are_mlx_lms_at_every_node(model, options, foreign, shape):
    from mlx_lm.sample_utils import make_logits_processors

    processors = make_logits_processors(**options)
    target = Target(model)
    engine = Engine(Runner(target, RandomDrafter(target)), Fixed(shape))
    ours = {k: tuple(v.items()) if isinstance(v, dict) else v for k, v in options.items()}
    how = {"processors": processors} if foreign else {"sampling": Sampling(**ours)}
    asked = {}
    for prompt in prompts(3, 2):
        asked[engine.submit(Request(prompt, 40, **how))] = plain(
            model, prompt, 40, logits_processors=processors
        )
    assert finish(engine) == asked
    assert finish(engine) != [plain(model, prompt, 40) for prompt in prompts(3, 2)]


def test_an_error_ends_its_own_request_only(model):
    target = Target(model)
    engine = Engine(Runner(target, RandomDrafter(target)), Fixed(SHAPES[2]))

    def bad(tokens, logits):
        if len(tokens) > 14:
            raise KeyError("mine")
        return logits

    def good(tokens, logits):
        return logits

    one = engine.submit(Request([1] * 9, 20, processors=[bad]))
    two = engine.submit(Request([2] * 9, 20, processors=[good]))
    three = engine.submit(Request([3] * 9, 20))
    four = engine.submit(Request([4] * 9, 20))
    seen, texts = {}, {}
    while engine.is_busy:
        for emitted in engine.step():
            texts.setdefault(emitted.number, []).extend(emitted.tokens)
            seen[emitted.number] = emitted
            if emitted.number == four and len(texts[four]) > 3:
                engine.cancel(four)
    assert seen[one].finish == "error" and isinstance(seen[one].error, KeyError)
    assert texts[one] == plain(model, [1] * 9, 20)[: len(texts[one])]
    assert texts[two] == plain(model, [2] * 9, 20)
    assert texts[three] == plain(model, [3] * 9, 20)
    assert len(texts[four]) < 20


def test_texts_of_very_different_length_do_not_make_each_other_pay(model):
    target = Target(model)
    engine = Engine(Runner(target, None), Fixed(SHAPES[3]))
    lengths = [100, 110, 3000, 90, 2950]
    wanted = {}
    for i, length in enumerate(lengths):
        prompt = [(7 * j + i) % 101 for j in range(length)]
        wanted[engine.submit(Request(prompt, 40))] = plain(model, prompt, 40)
    found = {}
    for step in range(400):
        for emitted in engine.step():
            found.setdefault(emitted.number, []).extend(emitted.tokens)
        if step == 20:
            needs = sum(bucket(length + 40) for length in lengths)
            row = 2 * sum(part.nbytes // part.shape[2] for part in layer_of(target))
            assert 0 < engine.nbytes <= 1.3 * needs * row
    assert found == wanted


@pytest.mark.parametrize(
    ("share", "most", "batches"), [(1e4, 1 << 28, 1), (1e4, 1000, 2), (1e-4, 1 << 28, 2)]
)
def test_padding_that_is_little_beside_the_weights_is_cheaper_than_another_pass(
    model, monkeypatch, share, most, batches
):
    monkeypatch.setattr("mlx_redrafter.engine.engine.SPARE", share)
    monkeypatch.setattr("mlx_redrafter.engine.engine.MOST_SPARE", most)
    engine = Engine(Runner(Target(model), None), Fixed(SHAPES[3]))
    prompts = [[(7 * j + i) % 101 for j in range(length)] for i, length in enumerate((400, 20, 30))]
    wanted = {engine.submit(Request(prompt, 10)): plain(model, prompt, 10) for prompt in prompts}
    found, most_batches = {}, 0
    while engine.is_busy:
        for emitted in engine.step():
            found.setdefault(emitted.number, []).extend(emitted.tokens)
        most_batches = max(most_batches, len(engine._batches))
    assert most_batches == batches
    assert found == wanted


def layer_of(target):
    return target.layers_of(target.make_cache())[1].rows[0]


def test_texts_wait_for_memory_and_for_a_place(model):
    target = Target(model)
    row = 2 * sum(part.nbytes // part.shape[2] for part in layer_of(target))
    engine = Engine(Runner(target, None), Fixed(SHAPES[0]), max_memory=2 * 256 * row, texts=3)
    numbers = [engine.submit(Request([1 + i] * 20, 30)) for i in range(5)]
    engine.submit(Request([9] * 3000, 5))  # alone it is admitted, though it needs more
    at_once, ended = 0, []
    while engine.is_busy:
        emitted = engine.step()
        at_once = max(at_once, len(emitted))
        ended += [each.number for each in emitted if each.finish]
        assert engine.nbytes <= 2 * 256 * row or len(emitted) <= 1
    assert at_once == 2
    assert sorted(ended) == [*numbers, numbers[-1] + 1]


def test_a_long_prompt_lets_the_others_go_on(model):
    target = Target(model)
    engine = Engine(Runner(target, None), Fixed(SHAPES[0]), chunk=16)
    first = engine.submit(Request([3, 4, 5], 200))
    for _ in range(3):
        engine.step()
    engine.submit(Request([1] * 161, 3))
    for _ in range(10):  # ten chunks, and a step of the other text after each
        assert [each.number for each in engine.step()] == [first]
    assert len(engine.step()) == 2


@pytest.mark.parametrize("length", [255, 256, 257, 258, 513])
def test_a_prompt_that_fills_its_buffers(model, length):
    target = Target(model)
    prompt = [i % 101 for i in range(length)]
    for shape in SHAPES[:3]:
        engine = Engine(Runner(target, RandomDrafter(target)), Fixed(shape))
        number = engine.submit(Request(prompt, 9))
        assert finish(engine) == {number: plain(model, prompt, 9)}


def test_few_shapes_are_traced_for_any_number_of_texts(model):
    target = Target(model)
    run = Runner(target, RandomDrafter(target), compiled=True)
    engine = Engine(run, Fixed(SHAPES[2]), texts=16, grain=256, padded=lambda n: 1 << (n - 1).bit_length())
    rng = random.Random(3)
    wanted, found = {}, {}
    for prompt in prompts(40, 8):
        count = rng.randrange(2, 30)
        wanted[engine.submit(Request(prompt, count))] = plain(model, prompt, count)
    while engine.is_busy:
        for emitted in engine.step():
            found.setdefault(emitted.number, []).extend(emitted.tokens)
    assert found == wanted
    sizes = {size for _, _, size, _ in run._uses}
    assert sizes <= {1, 2, 4, 8, 16}
    assert len(run._uses) <= 3 * len(sizes)  # plain and drafted, after short and longer texts


def test_a_text_that_leaves_before_it_has_joined_costs_the_others_nothing(model):
    target = Target(model)
    batch = Batch(lambda texts: Runner(target, None), Fixed(SHAPES[0]), target.vocabulary)
    first, second = Text(1, left=20, rows=8), Text(2, left=20, rows=8)
    batch.join(first, before_the_last(target, [1] * 9))
    said = [token for _ in range(3) for emitted in batch.step() for token in emitted.tokens]
    batch.join(second, before_the_last(target, [2] * 9))
    batch.leave(second)
    while batch.texts:
        said += [token for emitted in batch.step() for token in emitted.tokens]
    assert said == plain(model, [1] * 9, 20)


def test_random_requests_get_what_each_gets_alone_and_leave_nothing(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    harness, soak = (importlib.import_module(name) for name in ("harness", "soak_requests"))
    found = soak.soak(harness.tiny(vocabulary=soak.VOCABULARY), 60, seed=1, size=20)
    assert found["passed"], found
    assert found["drafted"] > 50 and set(found["ends"]) == {"length", "stop", "cancelled"}
