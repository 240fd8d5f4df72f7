"""The drafter's arithmetic against NumPy, written from arXiv 2403.09919, section 3."""

import io
import itertools
import re

import mlx.core as mx
import numpy as np
import pytest

from mlx_redrafter.models.drafter import Drafter, DrafterConfig, Quantization

H, V = 8, 20
CASES = [
    (cell, *sizes)
    for cell in (None, "simple", "gru")
    for sizes in itertools.product((16, 12), (0, 1, 2), (None, 5), ((), (2, 1)))
]
NAMES = ("cell", "exit_dim", "blocks", "draft_vocab", "context_layers")


def make(cell="simple", exit_dim=16, blocks=2, draft_vocab=None, context_layers=(), quantization=None):
    config = DrafterConfig(
        H,
        V,
        exit_dim,
        blocks,
        cell is not None,
        draft_vocab,
        context_layers,
        cell or "simple",
        quantization,
    )
    mx.random.seed(0)
    return Drafter(config, None if draft_vocab is None else mx.array([1, 3, 4, 11, 19], mx.int32))


def silu(x):
    return x / (1 + np.exp(-x))


def golden(weights, config, embeddings, context):
    """Logits [T, Vd] after each of the embeddings [T, H], with the context [F]."""
    w = {name: np.array(value, np.float64) for name, value in weights.items()}
    state, logits = np.zeros(config.hidden_size), []
    for embedding in embeddings:
        if config.cell == "gru":
            new, old = w["rnn_w.weight"] @ embedding, w["rnn_u.weight"] @ state + w["rnn_u.bias"]
            z, r = 1 / (1 + np.exp(-(new + old)[: 2 * H].reshape(2, H)))
            state = (1 - z) * silu(new[2 * H :] + r * old[2 * H :]) + z * state
        elif config.rnn:
            state = silu(w["rnn_w.weight"] @ embedding + w["rnn_u.weight"] @ state + w["rnn_u.bias"])
        else:
            state = embedding + state
        x = np.concatenate([context, state])
        if config.exit_dim != len(x):
            x = w["input_proj.weight"] @ x + w["input_proj.bias"]
        for block in range(config.num_draft_layers):
            x = x + silu(w[f"lm_head.{block}.linear.weight"] @ x + w[f"lm_head.{block}.linear.bias"])
        logits.append(w[f"lm_head.{config.num_draft_layers}.weight"] @ x)
    return np.array(logits)


def run(drafter, embeddings, context):
    state, logits = mx.zeros((1, drafter.config.hidden_size)), []  # [B, H]
    for embedding in embeddings:
        state = drafter.advance(mx.array(embedding, mx.float32)[None], state)
        logits.append(drafter.logits(drafter.prepare(mx.array(context, mx.float32)[None]), state)[0])
    return np.array(mx.stack(logits))


@pytest.mark.parametrize(NAMES, CASES)
def test_golden_values(cell, exit_dim, blocks, draft_vocab, context_layers):
    drafter = make(cell, exit_dim, blocks, draft_vocab, context_layers)
    random = np.random.RandomState(1)
    embeddings, context = random.randn(3, H), random.randn(drafter.config.context_size)
    expected = golden(drafter.weights(), drafter.config, embeddings, context)
    assert expected.shape == (3, draft_vocab or V)
    for mode in (True, False, True):
        np.testing.assert_allclose(run(drafter.train(mode), embeddings, context), expected, atol=1e-5)


@pytest.mark.parametrize(NAMES, CASES)
def test_shapes_are_those_of_the_network(cell, exit_dim, blocks, draft_vocab, context_layers):
    drafter = make(cell, exit_dim, blocks, draft_vocab, context_layers)
    assert {name: value.shape for name, value in drafter.weights().items()} == drafter.config.shapes()


def test_any_leading_axes():
    drafter = make()
    embedding, state = mx.random.normal((2, 3, H)), mx.random.normal((2, 3, H))
    wide = drafter.logits(drafter.prepare(embedding), drafter.advance(embedding, state))
    one = drafter.logits(drafter.prepare(embedding[1, 2]), drafter.advance(embedding[1, 2], state[1, 2]))
    assert wide.shape == (2, 3, V)
    np.testing.assert_allclose(np.array(wide[1, 2]), np.array(one), atol=1e-5)


def test_drafting_takes_one_product_less_per_depth_than_training():
    products = []
    for mode in (True, False):
        drafter, state, logits, graph = make(exit_dim=12).train(mode), mx.zeros((1, H)), [], io.StringIO()
        for _ in range(3):
            state = drafter.advance(mx.zeros((1, H)), state)
            logits.append(drafter.logits(mx.zeros((1, 12)), state))
        mx.export_to_dot(graph, *logits)
        products.append(len(re.findall('label ="(?:Matmul|AddMM)"', graph.getvalue())))
    assert products == [3 * 6, 3 * 5]  # of them 2 in the blocks, 1 in the head


def test_to_target():
    index = mx.array([[0, 4], [2, 0]])
    assert make(draft_vocab=5).to_target(index).tolist() == [[1, 19], [4, 1]]
    assert make().to_target(index).tolist() == index.tolist()


def test_the_map_is_no_parameter():
    drafter = make(draft_vocab=5)
    assert "draft_to_target" in drafter.weights()
    assert all(
        mx.issubdtype(value.dtype, mx.floating) for _, value in mx_leaves(drafter.trainable_parameters())
    )


def mx_leaves(tree):
    from mlx.utils import tree_flatten

    return tree_flatten(tree)


def test_compiles():
    drafter = make(draft_vocab=5)

    def draft(embedding, state, context):
        state = drafter.advance(embedding, state)
        return drafter.to_target(mx.argmax(drafter.logits(drafter.prepare(context), state), axis=-1)), state

    inputs = [mx.random.normal((2, H)) for _ in range(3)]
    for plain, compiled in zip(draft(*inputs), mx.compile(draft)(*inputs), strict=True):
        np.testing.assert_allclose(np.array(plain), np.array(compiled), atol=1e-6)


@pytest.mark.parametrize(("bits", "group_size"), [(8, 32), (4, 64), (3, 32)])
def test_quantized_layers_are_those_that_fit(bits, group_size):
    quantization = Quantization(bits, group_size)
    config = DrafterConfig(64, 100, 96, 1, rnn=True, quantization=quantization)
    drafter = Drafter(config)
    assert {name: value.shape for name, value in drafter.weights().items()} == config.shapes()
    fits = "lm_head.1.scales" in config.shapes()  # 96 is a multiple of 32 and not of 64
    assert fits == (group_size == 32)
    assert "rnn_u.scales" in config.shapes()


@pytest.mark.parametrize(("exit_dim", "group_size"), [(64, 32), (96, 32), (96, 64)])
def test_quantized_arithmetic(exit_dim, group_size):
    config = DrafterConfig(32, 40, exit_dim, 1, rnn=True, quantization=Quantization(4, group_size))
    drafter = Drafter(config)
    plain = dict(drafter.weights())
    for name in [name for name in plain if name.endswith(".scales")]:
        layer = name.removesuffix(".scales")
        packed = [plain.pop(f"{layer}.{part}") for part in ("weight", "scales", "biases")]
        plain[f"{layer}.weight"] = mx.dequantize(*packed, group_size=group_size, bits=4)
    random = np.random.RandomState(1)
    embeddings, context = random.randn(3, 32), random.randn(config.context_size)
    expected = golden(plain, config, embeddings, context)
    for mode in (True, False):
        np.testing.assert_allclose(run(drafter.train(mode), embeddings, context), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"vocab_size": -3}, "vocab_size is -3"),
        ({"exit_dim": 1.5}, "exit_dim is 1.5"),
        ({"exit_dim": "16"}, "exit_dim is '16'"),
        ({"num_draft_layers": -1}, "num_draft_layers is -1"),
        ({"num_draft_layers": True}, "num_draft_layers is True"),
        ({"rnn": "yes"}, "rnn is 'yes'"),
        ({"draft_vocab_size": 21}, "more than the vocabulary"),
        ({"draft_vocab_size": 0}, "draft_vocab_size is 0"),
        ({"context_layers": [0]}, "context_layers is \\[0\\]"),
        ({"context_layers": 3}, "context_layers is 3"),
        ({"cell": "lstm"}, "cell is 'lstm'"),
        ({"cell": "gru", "rnn": False}, "with rnn true"),
        ({"quantization": {"bits": 7, "group_size": 64}}, "7 bits"),
        ({"quantization": {"bits": 4, "group_size": 48}}, "group size 48"),
        ({"quantization": 4}, "quantization is 4"),
    ],
)
def test_config_refuses(change, complaint):
    raw = {"hidden_size": H, "vocab_size": V, "exit_dim": 16, "num_draft_layers": 1, **change}
    with pytest.raises(ValueError, match=complaint):
        DrafterConfig.from_dict(raw)


def test_config_names_what_is_missing():
    with pytest.raises(ValueError, match="'exit_dim' is missing"):
        DrafterConfig.from_dict({"hidden_size": H, "vocab_size": V})


def test_config_defaults_are_apples():
    raw = {"hidden_size": H, "vocab_size": V, "exit_dim": 16, "num_draft_layers": 2, "emb_norm": False}
    config = DrafterConfig.from_dict(raw)
    assert (config.rnn, config.draft_vocab_size, config.context_layers, config.quantization) == (
        False,
        None,
        (),
        None,
    )


def test_config_round_trip():
    config = DrafterConfig(H, V, 16, 1, True, 5, (1, 3), "gru", Quantization(4, 32))
    assert DrafterConfig.from_dict(config.to_dict()) == config


def test_a_trimmed_drafter_needs_its_map():
    with pytest.raises(ValueError, match="draft_to_target"):
        Drafter(DrafterConfig(H, V, 16, 1, draft_vocab_size=5))
