"""Layers computed otherwise on x86 processors: mlx-lm's numbers but for rounding, and only where known."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from models import make_model

from mlx_redrafter.models.hooks import Tape, view
from mlx_redrafter.models.target import Target
from mlx_redrafter.models.x86 import Attention, FeedForward, attend, quicken

# Which of Llama's layers a model has.
SAME = {
    "llama": (1, 1),
    "mistral": (1, 1),
    "qwen2": (1, 1),
    "qwen3": (0, 1),
    "gemma": (1, 0),
    "gemma2": (0, 0),
}


def quick_view(model):
    tape = Tape()
    seen = view(model, tape)
    quicken(seen, tape)
    tape.start(mx.zeros((1, 1), mx.int32), None, None, 0)
    return seen, tape


def quick_layers(module, kind):
    return sum(isinstance(part, kind) for part in module.modules())


def assert_close(found, wanted):
    assert mx.abs(found - wanted).max().item() <= 1e-5 * mx.abs(wanted).max().item()


@pytest.mark.parametrize("name", SAME)
def test_models_say_the_same_in_passes_of_all_lengths(name):
    model = make_model(name)
    seen, _ = quick_view(model)
    layers = len(model.layers)
    found = quick_layers(seen, Attention), quick_layers(seen, FeedForward)
    assert found == tuple(layers * count for count in SAME[name])
    assert type(model.layers[0].self_attn) is type(make_model(name).layers[0].self_attn)  # the model stays
    ours, theirs = make_prompt_cache(model), make_prompt_cache(model)
    for count in (7, 1, 1, 4):  # a prompt, single tokens, several after others
        tokens = mx.random.randint(0, 101, (1, count))
        assert_close(seen(tokens, cache=ours), model(tokens, cache=theirs))


@pytest.mark.parametrize("bits", [None, 8])
def test_caches_that_are_quantized(bits):
    model = make_model("llama", hidden_size=128, head_dim=32)
    seen, _ = quick_view(model)
    tokens = mx.random.randint(0, 101, (1, 9))
    caches = [make_prompt_cache(model) for _ in range(2)]
    if bits:
        caches = [[cache.to_quantized(32, bits) for cache in each] for each in caches]
    assert_close(seen(tokens, cache=caches[0]), model(tokens, cache=caches[1]))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_left_to_mlx_lm(dtype):
    model = make_model("llama")
    model.set_dtype(dtype)
    seen, tape = quick_view(model)
    tokens = mx.random.randint(0, 101, (1, 5))
    caches = [make_prompt_cache(model) for _ in range(2)]
    assert mx.array_equal(seen(tokens, cache=caches[0]), model(tokens, cache=caches[1])).item()
    assert not tape.masks


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_attention_is_mlx_s(heads, size):
    queries = size * mx.random.normal((2, heads[0], 5, 8))
    keys, values = (mx.random.normal((2, heads[1], 11, 8)) for _ in range(2))
    shown = mx.random.uniform(shape=(2, 1, 5, 11)) < 0.6
    shown[..., 0] = True
    bias = mx.where(shown, 0.0, -mx.inf)
    wanted = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.3, mask=shown)
    grouped = mx.repeat(bias, heads[1], axis=1)
    grouped = mx.tile(grouped, (1, 1, heads[0] // heads[1], 1))
    assert_close(attend(queries, keys, values, 0.3, grouped), wanted)
    wanted = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.3)
    assert_close(attend(queries, keys, values, 0.3), wanted)


def test_large_gates_stay_finite():
    model = make_model("llama")
    mlp = quick_view(model)[0].layers[0].mlp
    for size in (100.0, 1e4, 1e6):
        x = size * mx.random.normal((1, 3, 32))
        assert_close(mlp(x), model.layers[0].mlp(x))


def test_layers_share_masks_within_a_pass():
    model = make_model("llama", num_hidden_layers=3)
    seen, tape = quick_view(model)
    seen(mx.zeros((1, 6), mx.int32), cache=make_prompt_cache(model))
    assert list(tape.masks) == [("causal", (1, 2, 2, 6, 6))]
    mask = mx.ones((4, 4), mx.bool_)
    for layer in seen.layers:
        layer.self_attn(mx.random.normal((1, 4, 32)), mask, make_prompt_cache(model)[0])
    assert len(tape.masks) == 2
    tape.stop([])
    assert not tape.masks


class Louder(nn.Module):
    """A feed-forward layer with the attributes of Llama's, and other code."""

    def __init__(self, args):
        super().__init__()
        self.inner = llama.MLP(args)
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(32, 32) for _ in range(3))

    def __call__(self, x):
        return 2 * self.inner(x)


def test_other_code_is_left_as_it_is():
    model = make_model("llama")
    model.model.layers[0].mlp = Louder(model.args)
    seen, _ = quick_view(model)
    assert type(seen.layers[0].mlp) is Louder
    assert quick_layers(seen, FeedForward) == len(model.layers)  # the one inside of it included
    tokens = mx.random.randint(0, 101, (1, 5))
    caches = [make_prompt_cache(model) for _ in range(2)]
    assert_close(seen(tokens, cache=caches[0]), model(tokens, cache=caches[1]))


def test_only_x86_processors_have_them(monkeypatch):
    target = "mlx_redrafter.models.target.platform.machine"
    for machine, quick in (("x86_64", 2), ("AMD64", 2), ("arm64", 0), ("aarch64", 0)):
        monkeypatch.setattr(target, lambda machine=machine: machine)
        assert quick_layers(Target(make_model("llama"))._view.model.inner, Attention) == quick
