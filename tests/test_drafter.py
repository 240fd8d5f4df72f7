"""The drafter's arithmetic against NumPy, written from arXiv 2403.09919, section 3."""

import io
import itertools
import re

import mlx.core as mx
import numpy as np
import pytest

from mlx_redrafter.decoding.beam import draft
from mlx_redrafter.models.drafter import Drafter, DrafterConfig, Quantization
from mlx_redrafter.models.fused import FusedDrafter

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


class Unfused:
    """The network itself as what ``draft`` wants."""

    def __init__(self, drafter):
        self.start = mx.zeros(drafter.config.hidden_size)
        self.advance, self.logits, self.to_target = drafter.advance, drafter.logits, drafter.to_target

    def prepare(self, context):
        return context


def run(proposer, embeddings, context):
    """Logits [T, Vd] after each of the embeddings [T, H], with the context [F]."""
    state, logits = proposer.start[None], []  # [B, S]
    prepared = proposer.prepare(mx.array(context, mx.float32)[None])
    for embedding in embeddings:
        state = proposer.advance(mx.array(embedding, mx.float32)[None], state)
        logits.append(proposer.logits(prepared, state)[0])
    return np.array(mx.stack(logits))


@pytest.mark.parametrize(NAMES, CASES)
def test_golden_values(cell, exit_dim, blocks, draft_vocab, context_layers):
    drafter = make(cell, exit_dim, blocks, draft_vocab, context_layers)
    random = np.random.RandomState(1)
    embeddings, context = random.randn(3, H), random.randn(drafter.config.context_size)
    expected = golden(drafter.weights(), drafter.config, embeddings, context)
    assert expected.shape == (3, draft_vocab or V)
    for made in (Unfused, FusedDrafter, Unfused):
        np.testing.assert_allclose(run(made(drafter), embeddings, context), expected, atol=1e-5)


@pytest.mark.parametrize(NAMES, CASES)
def test_shapes_are_those_of_the_network(cell, exit_dim, blocks, draft_vocab, context_layers):
    drafter = make(cell, exit_dim, blocks, draft_vocab, context_layers)
    assert {name: value.shape for name, value in drafter.weights().items()} == drafter.config.shapes()


def test_any_leading_axes():
    drafter = make()
    embedding, state = mx.random.normal((2, 3, H)), mx.random.normal((2, 3, H))
    wide = drafter.logits(embedding, drafter.advance(embedding, state))
    one = drafter.logits(embedding[1, 2], drafter.advance(embedding[1, 2], state[1, 2]))
    assert wide.shape == (2, 3, V)
    np.testing.assert_allclose(np.array(wide[1, 2]), np.array(one), atol=1e-5)


def test_drafting_takes_one_product_less_per_depth_than_training():
    products = []
    for made in (Unfused, FusedDrafter):
        proposer, logits, graph = made(make(exit_dim=12)), [], io.StringIO()
        prepared, state = proposer.prepare(mx.zeros((1, H))), proposer.start[None]
        mx.eval(prepared, state)
        for _ in range(3):
            state = proposer.advance(mx.zeros((1, H)), state)
            logits.append(proposer.logits(prepared, state))
        mx.export_to_dot(graph, *logits)
        products.append(len(re.findall('label ="(?:Matmul|AddMM)"', graph.getvalue())))
    assert products == [3 * 6 + 3, 3 * 5]  # of them 2 in the blocks, 1 in the head; of the context 3


def test_tokens_without_a_place():
    """Of a smaller vocabulary, and those that a model was given later."""
    for vocabulary, places in ((5, [0, 4, -1]), (None, [1, 19, -1])):
        drafter = make(draft_vocab=vocabulary)
        known = drafter.to_target(mx.array([0, 4])).tolist() if vocabulary else [1, 19]
        beyond = drafter.config.vocab_size + 3
        assert FusedDrafter(drafter).from_target(mx.array([[*known, beyond]])).tolist() == [places]


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


@pytest.mark.parametrize("made", [Unfused, FusedDrafter])
def test_compiles(made):
    proposer = made(make(draft_vocab=5))

    def first(embedding, state, context):
        state = proposer.advance(embedding, state)
        return proposer.to_target(
            mx.argmax(proposer.logits(proposer.prepare(context), state), axis=-1)
        ), state

    inputs = [mx.random.normal((2, size)) for size in (H, proposer.start.size, H)]
    for plain, compiled in zip(first(*inputs), mx.compile(first)(*inputs), strict=True):
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
    for made in (Unfused, FusedDrafter):
        np.testing.assert_allclose(run(made(drafter), embeddings, context), expected, atol=1e-4)


@pytest.mark.parametrize("quantization", [None, Quantization(4, 32), Quantization(8, 64)])
@pytest.mark.parametrize(("exit_dim", "draft_vocab"), [(64, None), (96, 30), (128, 30)])
@pytest.mark.parametrize(("cell", "layers"), [(None, ()), ("simple", ()), ("simple", (1, 2)), ("gru", (3,))])
def test_the_fused_twin_drafts_the_same(cell, layers, exit_dim, draft_vocab, quantization):
    rnn, kind = cell is not None, cell or "simple"
    config = DrafterConfig(32, 50, exit_dim, 1, rnn, draft_vocab, layers, kind, quantization)
    mx.random.seed(2)
    drafter = Drafter(config, None if draft_vocab is None else mx.arange(draft_vocab) + 7)
    table, context = mx.random.normal((50, 32)), mx.random.normal((2, config.context_size))
    body, twin = Unfused(drafter), FusedDrafter(drafter)
    for found, wanted in zip(run(twin, table[:4], context[0]), run(body, table[:4], context[0]), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    found, wanted = (draft(x, lambda ids: table[ids], mx.array([3, 9]), context, 4, 5) for x in (twin, body))
    assert found.tokens.tolist() == wanted.tokens.tolist()
    assert found.parents.tolist() == wanted.parents.tolist()
    np.testing.assert_allclose(np.array(found.scores), np.array(wanted.scores), atol=1e-5)


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
