"""Rotary embeddings of a view: sines that layers share on a CPU, exactly what mlx-lm computes in each."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from models import make_model

from mlx_redrafter.models.hooks import NodeRope, Tape

OFFSETS = {"chain": mx.array([5, 300]), "tree": mx.array([[5, 6, 6], [300, 301, 302]])}
# Models whose embeddings turn all of a head; those of the others are left to mlx-lm.
SHARED = ["llama", "llama3-rope", "llama-linear-rope", "gemma3"]
ALONE = ["qwen2-yarn", "phi3", "phi3-longrope"]


def ropes_of(model):
    return [layer.self_attn.rope for layer in model.layers]


def rotated(ropes, offset, x):
    """``x`` as each of the embeddings rotates it while nodes are verified, and how many sines were found."""
    tape = Tape()
    in_view = [NodeRope(rope, tape) for rope in ropes]
    tape.start(mx.zeros((2, 3), mx.int32), None, offset, 0)
    found = [rope(x, offset=offset) for rope in in_view]
    mx.eval(found)
    return found, len(tape.turns)


def one_by_one(rope, offset, x):
    """What mlx-lm's embedding gives, one node at a time."""
    places = offset if offset.ndim == 2 else offset[:, None] + mx.arange(3)
    nodes = [rope(x[:, :, i : i + 1], offset=places[:, i]) for i in range(3)]
    return mx.concatenate(nodes, axis=2)


@pytest.mark.parametrize("kind", OFFSETS)
@pytest.mark.parametrize("name", SHARED + ALONE)
def test_shared_sines_give_exactly_what_mlx_lm_computes(name, kind):
    ropes, x = ropes_of(make_model(name, rope_theta=1e6)), mx.random.normal((2, 4, 3, 8))
    found, sines = rotated(ropes, OFFSETS[kind], x)
    for rope, one in zip(ropes, found, strict=True):
        assert mx.array_equal(one, one_by_one(rope, OFFSETS[kind], x)).item()
    windows = name == "gemma3"  # which have sines of their own
    assert sines == (2 if windows else 1 if name in SHARED else 0)


def test_embeddings_that_differ_share_nothing():
    ropes = [nn.RoPE(8), nn.RoPE(8), nn.RoPE(8, base=50.0), nn.RoPE(8, scale=0.5)]
    x, offset = mx.random.normal((2, 4, 3, 8)), OFFSETS["tree"]
    found, sines = rotated(ropes, offset, x)
    assert sines == 3
    for rope, one in zip(ropes, found, strict=True):
        assert mx.array_equal(one, one_by_one(rope, offset, x)).item()


@pytest.mark.parametrize("rope", [nn.RoPE(8, traditional=True), nn.RoPE(4), lambda x, offset: x])
def test_other_embeddings_are_left_to_mlx_lm(rope):
    x, offset = mx.random.normal((2, 4, 3, 8)), OFFSETS["tree"]
    found, sines = rotated([rope], offset, x)
    assert sines == 0
    assert mx.array_equal(found[0], one_by_one(rope, offset, x)).item()


def test_no_sines_are_kept_for_other_positions():
    rope, tape, x = nn.RoPE(8), Tape(), mx.random.normal((2, 4, 3, 8))
    in_view, mine = NodeRope(rope, tape), mx.array([7, 8])
    for offset in OFFSETS.values():
        tape.start(mx.zeros((2, 3), mx.int32), None, offset, 0)
        assert mx.array_equal(in_view(x, offset=offset), one_by_one(rope, offset, x)).item()
        assert mx.array_equal(in_view(x, offset=mine), one_by_one(rope, mine, x)).item()  # a layer's own
        tape.stop([])
        assert not tape.turns
    half = x.astype(mx.float16)
    tape.start(mx.zeros((2, 3), mx.int32), None, mine, 0)
    assert mx.array_equal(in_view(half, offset=mine), rope(half, offset=mine)).item()
