"""mlx-lm's BatchGenerator and ours: the same calls give the same responses."""

import random
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from models import RandomDrafter, make_model

from mlx_redrafter import DraftShape, SpeculativeModel
from mlx_redrafter.engine.loop import Fixed
from mlx_redrafter.models.target import Target

pytest.importorskip("mlx_lm.generate_utils")  # older mlx-lm has another class

from mlx_lm.generate import BatchGenerator as THEIRS
from mlx_lm.generate import StopSequences

from mlx_redrafter import BatchGenerator


@pytest.fixture(scope="module")
def model():
    base = make_model("llama3-rope")
    drafter = RandomDrafter(Target(base))
    drafter.config = SimpleNamespace(head_outputs=101, context_layers=())
    model = SpeculativeModel(base, drafter)
    model.use_policy(Fixed(DraftShape(2, 3, 6, 3)))
    return model


def prompts(count, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(101) for _ in range(rng.choice((1, 2, 9, 40)))] for _ in range(count)]


def run(generator, uids):
    """By uid: tokens, log-probabilities of the last token, and the last response."""
    found = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        assert len({r.uid for r in responses}) == len(responses)  # one token of each text at a time
        for response in responses:
            found[response.uid].append(response)
    generator.close()
    return found


def both(model, call, **options):
    """What both classes make of the same calls."""
    ours, theirs = BatchGenerator(model, **options), THEIRS(model.model, **options)
    mine, wanted = (run(generator, call(generator)) for generator in (ours, theirs))
    assert mine.keys() == wanted.keys()
    for uid in mine:
        assert [r.token for r in mine[uid]] == [r.token for r in wanted[uid]]
        assert [r.finish_reason for r in mine[uid]] == [r.finish_reason for r in wanted[uid]]
        for left, right in zip(mine[uid], wanted[uid], strict=True):
            np.testing.assert_allclose(np.array(left.logprobs), np.array(right.logprobs), atol=1e-3)
        assert mine[uid][-1].all_tokens == wanted[uid][-1].all_tokens
        for left, right in zip(mine[uid][-1].prompt_cache, wanted[uid][-1].prompt_cache, strict=True):
            assert left.offset == right.offset == len(mine[uid][-1].all_tokens)
            rows = [np.array(cache.keys[..., : cache.offset, :]) for cache in (left, right)]
            np.testing.assert_allclose(*rows, atol=1e-4)
    return mine


def test_the_same_tokens_and_responses(model):
    def call(generator):
        return generator.insert(prompts(9), [5 + i for i in range(9)])

    both(model, call, completion_batch_size=4, prefill_batch_size=2, prefill_step_size=8)


def test_stop_sequences_of_one_and_of_several_tokens(model):
    some = prompts(4, 1)
    said = [[int(t) for t, _ in generate_step(mx.array(p), model.model, max_tokens=20)] for p in some]
    stops = [
        StopSequences([said[0][3:4]]),
        StopSequences([said[1][4:7]]),
        StopSequences(),
        StopSequences([[500]]),
    ]
    found = both(model, lambda g: g.insert(some, [20] * 4, stop_sequences=stops))
    assert [r[-1].finish_reason for r in found.values()] == ["stop", "stop", "length", "length"]
    both(model, lambda g: g.insert(some), stop_tokens=[said[2][5:6]], max_tokens=12)


def test_processors_and_samplers_of_each_text(model):
    processors = [
        make_logits_processors(repetition_penalty=1.5),
        None,
        make_logits_processors({7: 9.0}),
        None,
    ]
    samplers = [make_sampler(0.0), None, None, lambda logprobs: mx.argmin(logprobs, axis=-1)]

    def call(generator):
        return generator.insert(prompts(4, 2), [15] * 4, samplers=samplers, logits_processors=processors)

    found = both(model, call)
    assert len({tuple(r.token for r in texts) for texts in found.values()}) > 1


def test_going_on_with_a_cache(model):
    some, more = prompts(3, 3), prompts(3, 4)
    first = BatchGenerator(model)
    ended = [texts[-1] for texts in run(first, first.insert(some, [7] * 3)).values()]
    caches = [r.prompt_cache for r in ended]
    offsets = [cache[0].offset for cache in caches]

    def call(generator):
        return generator.insert(more, [9] * 3, caches=caches, all_tokens=[list(r.all_tokens) for r in ended])

    generator = BatchGenerator(model)
    found = run(generator, call(generator))
    assert [cache[0].offset for cache in caches] == offsets  # the caller's stay as they are
    for texts, end, prompt in zip(found.values(), ended, more, strict=True):
        whole = mx.array(end.all_tokens + prompt)
        wanted = [int(t) for t, _ in generate_step(whole, model.model, max_tokens=9)]
        assert [r.token for r in texts] == wanted
        assert texts[-1].all_tokens == end.all_tokens + prompt + wanted


def test_segments_pause_and_caches_can_be_taken_out(model):
    generator = BatchGenerator(model, prefill_step_size=64)
    prompt = prompts(1, 9)[0] + list(range(30))
    (uid,) = generator.insert_segments([[prompt[:10], prompt[10:]]], [5])
    told, _ = generator.next()
    assert [(r.uid, r.progress, r.end_of_segment, r.end_of_prompt) for r in told] == [
        (uid, (10, len(prompt)), True, False)
    ]
    caches, tokens = generator.extract_cache([uid])[uid]
    assert tokens == prompt[:10] and caches[0].offset == 10
    said = []
    while len(said) < 3:
        said += generator.next_generated()
    caches, tokens = generator.remove([uid], return_prompt_caches=True)[uid]
    assert tokens == prompt + [r.token for r in said]
    assert caches[0].offset == len(tokens)
    assert generator.next_generated() == []


def test_stats(model):
    generator = BatchGenerator(model, max_tokens=6)
    with generator.stats() as stats:
        run(generator, generator.insert(prompts(3, 5)))
    assert stats.prompt_tokens == sum(map(len, prompts(3, 5)))
    assert stats.generation_tokens == 18
    assert 0 < stats.generation_steps <= 18
    assert stats.prompt_time > 0 and stats.decode_time > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([[1], [2]], [5]), "max_tokens has 1 entries for 2 prompts"),
        (([[]],), "prompt 0 is empty"),
        (([[1]], [0]), "max tokens 0"),
    ],
)
def test_bad_arguments_take_nothing_in(model, arguments, message):
    generator = BatchGenerator(model)
    with pytest.raises(ValueError, match=message):
        generator.insert(*arguments)
    assert generator.next_generated() == []


def test_what_cannot_be_drafted_for_is_mlx_lms():
    base = make_model("llama")
    base.make_cache = lambda: [RotatingKVCache(99, keep=4) for _ in base.layers]
    assert type(BatchGenerator(base)) is THEIRS
    assert type(BatchGenerator(make_model("llama"), max_kv_size=64)) is THEIRS
    assert make_prompt_cache(base)
