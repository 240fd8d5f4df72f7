"""The loaded model is changed, copied, or another thread goes on: the text is always the model's own."""

import asyncio
import copy
import gc
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from bundles import make_drafter, make_folder
from mlx import nn
from mlx.utils import tree_map
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from models import make_model
from test_stream import PROMPT, Silent

from mlx_redrafter import (
    BatchGenerator,
    DraftShape,
    Sampling,
    SpeculativeModel,
    generate,
    load,
    stream_generate,
)
from mlx_redrafter import text as stream
from mlx_redrafter.engine import backend
from mlx_redrafter.engine.loop import Fixed
from mlx_redrafter.models.drafter import Drafter, DrafterConfig

SHAPES = [DraftShape(2, 3), DraftShape(0, 0, None, 3)]
COUNT = 20


def make_drafted(name="llama", **changes):
    base = make_model(name, hidden_size=64, **changes)
    config = DrafterConfig(64, 101, exit_dim=32, num_draft_layers=1, rnn=True, context_layers=(1,))
    mx.random.seed(4)
    drafter = Drafter(config)
    mx.eval(drafter.parameters())
    return SpeculativeModel(base, drafter)


def drafted(model, shape=SHAPES[0], count=COUNT, **options):
    return [r.token for r in stream_generate(model, Silent(), PROMPT, count, shape=shape, **options)]


def plain(model, count=COUNT):
    return [r.token for r in mlx_lm.stream_generate(model.model, Silent(), PROMPT, count)]


def noise(scale):
    def change(weights):
        if not mx.issubdtype(weights.dtype, mx.floating) or weights.ndim < 2:
            return weights
        return weights + scale * mx.random.normal(weights.shape, key=mx.random.key(weights.size))

    return change


def lora(model):
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 20.0, "dropout": 0.0})
    for _, module in model.named_modules():
        if hasattr(module, "lora_b"):
            module.lora_b = noise(0.3)(module.lora_b)


def scale_lora(model):
    lora(model)
    drafted(model)
    for _, module in model.named_modules():
        if hasattr(module, "lora_b"):
            module.scale = 60.0


def in_place(model):
    for layer in model.layers:
        weight = layer.mlp.down_proj.weight
        weight += noise(0.5)(weight)
    model.model.model.norm.weight[:20] *= 3


def swap_layer(model):
    model.layers[1] = make_model(hidden_size=64, seed=8).layers[0]


def other_parts(model):
    model.model.model.layers = model.model.model.layers[:1] + make_model(hidden_size=64, seed=8).layers


def other_rope(model):
    for layer in model.layers:
        layer.self_attn.rope = nn.RoPE(8, base=50.0)


def rope_base(model):
    for layer in model.layers:
        layer.self_attn.rope.base = 50.0


def more_tokens(model):
    embedding = model.model.model.embed_tokens
    embedding.weight = mx.concatenate([embedding.weight, 3 * embedding.weight[5:9]])


CHANGES = {
    "update": lambda model: model.update(tree_map(noise(0.2), model.parameters())),
    "in place": in_place,
    "apply": lambda model: model.apply(noise(0.3)),
    "load_weights": lambda model: model.load_weights(
        [("model.layers.0.mlp.up_proj.weight", mx.random.normal((48, 64), key=mx.random.key(2)))],
        strict=False,
    ),
    "quantize": lambda model: nn.quantize(
        model, 32, 2, class_predicate=lambda p, m: "mlp.up" in p or "embed" in p
    ),
    "half precision and back": lambda model: (model.set_dtype(mx.bfloat16), model.set_dtype(mx.float32)),
    "adapters": lora,
    "scale of adapters": scale_lora,
    "a layer": swap_layer,
    "number of layers": other_parts,
    "rotary embedding": other_rope,
    "its base": rope_base,
    "more tokens": more_tokens,
    "another model": lambda model: setattr(model, "model", make_model("qwen3", hidden_size=64, seed=5)),
}
COMPILED = ("update", "in place", "quantize", "scale of adapters", "a layer")


@pytest.mark.parametrize(
    ("name", "device"),
    [*((name, backend.CPU) for name in CHANGES), *((name, backend.METAL) for name in COMPILED)],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_is_said_is_the_model_as_it_is_now(name, device, monkeypatch):
    monkeypatch.setattr(backend, "current", lambda: device)  # Metal's steps are compiled, the CPU's are not
    model = make_drafted()
    before = plain(model)
    for shape in SHAPES:
        assert drafted(model, shape) == before
    CHANGES[name](model)
    expected = plain(model)
    assert expected != before
    for shape in SHAPES:
        assert drafted(model, shape) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        last = list(stream_generate(model, Silent(), PROMPT, COUNT, shape=SHAPES[0]))[-1]
    assert last.steps > 0  # so it is still drafted


def test_a_change_before_the_first_token_counts():
    model = make_drafted()
    before, responses = plain(model), stream_generate(model, Silent(), PROMPT, COUNT, shape=SHAPES[0])
    model.update(tree_map(noise(0.2), model.parameters()))
    drafted(model)
    assert [r.token for r in responses] == plain(model) != before


def test_a_part_that_is_set_is_set_in_the_model():
    model = make_drafted("llama-untied")
    before = plain(model)
    model.lm_head = nn.Linear(64, 101, bias=False)
    assert drafted(model) == plain(model) != before


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3-longrope", "qwen3_moe"])
def test_a_model_that_did_not_change_is_not_looked_into_again(name):
    model = SpeculativeModel(make_model(name), None)
    found = model.prepare().target, model.engine(Fixed(SHAPES[0])).runner
    shape = DraftShape(0, 0, None, 3)
    assert drafted(model, shape) == plain(model)
    model.freeze()
    assert drafted(model, shape) == plain(model)
    assert (model.prepare().target, model.engine(Fixed(SHAPES[0])).runner) == found


def test_policies_stay_unless_steps_take_another_time(monkeypatch):
    monkeypatch.setattr("mlx_redrafter.engine.step_times.make_policy", lambda model, lookup: Fixed(SHAPES[0]))
    model = make_drafted()
    mine = Fixed(SHAPES[1])
    model.use_policy(mine, 5)
    measured = model.make_policy()
    model.update(tree_map(noise(0.2), model.parameters()))
    assert model.make_policy() is measured
    nn.quantize(model, 32, 4, class_predicate=lambda path, _: path.endswith("up_proj"))
    assert model.make_policy() is not measured
    assert model.make_policy(5) is mine


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = tmp_path_factory.mktemp("bundle")
    base = make_folder(root / "model", "Hé🙂好w!")
    return base, make_drafter(root / "drafter", base)


def test_a_drafter_that_is_changed_drafts_as_it_is_now(bundle):
    model, tokenizer = load(bundle[0], drafter=bundle[1])

    def steps():
        return list(stream_generate(model, tokenizer, ">", 99, shape=DraftShape(1, 4)))[-1].steps

    good = model.drafter.parameters()
    least = steps()
    model.drafter.update(tree_map(mx.zeros_like, good))
    most = steps()
    assert most > 2 * least
    model.drafter.update(good)
    assert steps() == least
    other = model.drafter
    model.drafter = None
    assert [model.drafter, steps()] == [None, most]  # one token each: nothing is drafted
    model.drafter = other
    assert steps() == least


def test_a_drafter_that_was_changed_is_fused_anew():
    model = make_drafted()
    assert drafted(model) == plain(model)
    config = model.drafter.config
    other = Drafter(config)
    model.drafter.update(other.parameters())
    mx.random.seed(5)
    wanted = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(5)
    twin = model.engine(Fixed(SHAPES[0])).runner.drafter
    assert mx.random.uniform(shape=(4,)).tolist() == wanted  # fusing draws none
    context, embedding = mx.random.normal((2, config.context_size)), mx.random.normal((2, config.hidden_size))
    mine = twin.logits(twin.prepare(context), twin.advance(embedding, twin.start[None]))
    theirs = other.logits(context, other.advance(embedding, mx.zeros((2, config.hidden_size))))
    np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model, "model", make_model("llama", hidden_size=32)), "model has 32 and 101"),
        (lambda model: setattr(model, "model", make_model("llama", vocab_size=80)), "vocabulary 101"),
        (
            lambda model: setattr(
                model.model, "make_cache", lambda: [RotatingKVCache(99, keep=4) for _ in model.layers]
            ),
            "its RotatingKVCache cannot be rolled back",
        ),
    ],
)
def test_what_no_longer_fits_is_decoded_plainly_and_told(change, message):
    model = make_drafted()
    first = drafted(model)
    base = model.model
    change(model)
    with pytest.warns(UserWarning, match=f"decoding without the drafter: .*{message}"):
        assert drafted(model) == plain(model)
    model.model = base
    vars(base).pop("make_cache", None)
    assert drafted(model) == first
    assert model.refusal == ""


def test_a_model_that_cannot_verify_drafts_is_told_once_also_without_a_drafter(recwarn):
    base = make_model("llama")
    base.make_cache = lambda: [RotatingKVCache(99, keep=4) for _ in base.layers]
    model = SpeculativeModel(base, None)
    wanted = plain(model)
    assert not recwarn.list  # nobody asked for drafts
    assert [drafted(model), drafted(model)] == [wanted, wanted]
    BatchGenerator(model).close()
    (told,) = [str(each.message) for each in recwarn.list]
    assert told.startswith(
        "decoding without drafts: Model type llama cannot verify drafts: its RotatingKVCache"
    )
    generate(SpeculativeModel(base, None), Silent(), PROMPT, max_tokens=2)
    BatchGenerator(base).close()
    assert [str(each.message) for each in recwarn.list] == [told] * 3


def by_threads(responses):
    """Each response by another thread, and what that and this one make of its log-probabilities."""
    found = []
    for _ in range(COUNT):
        with ThreadPoolExecutor(1) as pool:
            response = pool.submit(next, responses).result()
            likeliest = pool.submit(lambda r=response: int(np.argmax(np.array(r.logprobs)))).result()
        found.append((response.token, likeliest, int(mx.argmax(response.logprobs))))
    return found


@pytest.mark.parametrize("device", [backend.CPU, backend.METAL], ids=lambda device: device.name)
def test_any_thread_goes_on(device, monkeypatch):
    monkeypatch.setattr(backend, "current", lambda: device)
    model = make_drafted()
    for shape in SHAPES:
        responses = stream_generate(model, Silent(), PROMPT, COUNT, shape=shape)
        assert by_threads(responses) == [(token, token, token) for token in plain(model)]


def test_coroutines_in_turn():
    model = make_drafted()

    async def read(responses):
        tokens = []
        while (response := await asyncio.to_thread(next, responses, None)) is not None:
            tokens.append(response.token)
        return tokens

    async def all_of_them():
        made = [stream_generate(model, Silent(), PROMPT, COUNT, shape=SHAPES[i % 2]) for i in range(4)]
        return await asyncio.gather(*(read(responses) for responses in made))

    assert asyncio.run(all_of_them()) == [plain(model)] * 4


def test_many_threads_at_once_use_few_streams():
    model = make_drafted()
    expected = plain(model)
    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            texts = list(pool.map(lambda i: drafted(model, SHAPES[i % 2]), range(8)))
        assert texts == [expected] * 8
    assert sum(map(len, stream._idle_streams.values())) <= 10


@pytest.mark.parametrize("draft", [True, False])
def test_a_seed_counts_in_every_thread(draft):
    model = make_drafted()

    def run(seed):
        options = {"shape": SHAPES[0], "sampling": Sampling(1.0), "draft": draft}
        return stream_generate(model, Silent(), PROMPT, COUNT, seed=seed, **options)

    here = [r.token for r in run(1)]
    with ThreadPoolExecutor(1) as pool:
        assert [r.token for r in pool.submit(list, run(1)).result()] == here
        assert [r.token for r in pool.submit(list, run(2)).result()] != here
    if draft:
        assert [token for token, *_ in by_threads(run(1))] == here


def test_closed_in_another_thread_the_cache_holds_what_was_said():
    model = make_drafted()
    cache, expected = make_prompt_cache(model), plain(model)
    responses = stream_generate(model, Silent(), PROMPT, COUNT, shape=SHAPES[0], prompt_cache=cache)
    assert [next(responses).token for _ in range(5)] == expected[:5]
    in_thread(responses.close)
    assert cache[0].offset == len(PROMPT) + 5
    rest = mlx_lm.stream_generate(model.model, Silent(), expected[5:6], COUNT - 6, prompt_cache=cache)
    assert [r.token for r in rest] == expected[6:]


def test_left_alone_and_collected_in_another_thread():
    model = make_drafted()
    held = [stream_generate(model, Silent(), PROMPT, COUNT, shape=SHAPES[0])]
    next(held[0])
    idle = sum(map(len, stream._idle_streams.values()))
    in_thread(lambda: (held.clear(), gc.collect()))
    assert sum(map(len, stream._idle_streams.values())) == idle + 1
    assert drafted(model) == plain(model)


def in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies_draft_and_are_their_own(copied):
    model = make_drafted()
    model.context_length = 77
    before = drafted(model)
    twin = copied(model)
    assert drafted(twin) == before
    assert [twin.context_length, twin.drafter.config] == [77, model.drafter.config]
    if copied is not copy.copy:
        twin.update(tree_map(noise(0.2), twin.parameters()))
        assert drafted(twin) == plain(twin) != before
        assert drafted(model) == before


def test_warnings_may_be_errors(bundle):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, tokenizer = load(bundle[0], drafter=bundle[1])
        texts = [r.text for r in stream_generate(model, tokenizer, ">", 99, shape=SHAPES[0])]
    assert "".join(texts) == "Hé🙂好w!"
