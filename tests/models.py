"""Tiny random language models of every architecture under test, and drafters of every quality."""

import importlib
import itertools
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_redrafter.models.target import Target

VOCABULARY = 101
COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "head_dim": 8,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}

# name -> (mlx-lm module, what differs from COMMON)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama3-rope": ("llama", {"rope_scaling": LLAMA3_ROPE}),
    "llama-linear-rope": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "mistral": ("llama", {"num_key_value_heads": 1}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_scaling": YARN_ROPE}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 8}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5}),
    "phi3-longrope": (
        "phi3",
        {
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
            "original_max_position_embeddings": 64,
        },
    ),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "granite": (
        "granite",
        {
            "logits_scaling": 4.0,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
    "mixtral": ("mixtral", {**MOE, "tie_word_embeddings": False}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": 8,
            "sliding_window_pattern": 2,
            "num_hidden_layers": 4,
            "query_pre_attn_scalar": 8,
        },
    ),
}


def make_model(name: str = "llama", seed: int = 0, **changes: Any) -> nn.Module:
    """A float32 model whose next-token distributions are far from uniform, and differ by position."""
    module, config = ARCHITECTURES[name]
    arch = importlib.import_module(f"mlx_lm.models.{module}")
    mx.random.seed(seed)
    model = arch.Model(arch.ModelArgs.from_dict({"model_type": module, **COMMON, **config, **changes}))
    weights = [
        (path, value + 0.2 * mx.random.normal(value.shape)) if value.ndim > 1 else (path, value)
        for path, value in tree_flatten(model.parameters())
    ]
    model.load_weights(weights)
    model.eval()
    mx.eval(model.parameters())
    return model


class Unprepared:
    """A drafter whose head reads the context as it is."""

    start = mx.array([0.0, 0.0])

    def prepare(self, context: mx.array) -> mx.array:
        return context

    def from_target(self, tokens: mx.array) -> mx.array:
        return tokens


class RandomDrafter(Unprepared):
    """Drafts anything: an untrained recurrent drafter."""

    def __init__(self, target: Target, seed: int = 1) -> None:
        hidden = target.embed(mx.array([0])).shape[-1]
        vocabulary = target.embed.weight.shape[0]
        keys, self.start = mx.random.split(mx.random.key(seed), 3), mx.zeros(hidden)
        self.mix = mx.random.normal((2 * hidden, hidden), key=keys[0])
        self.head = mx.random.normal((2 * hidden, vocabulary), key=keys[1])

    def advance(self, embedding: mx.array, state: mx.array) -> mx.array:
        return mx.tanh(mx.concatenate([embedding, state], axis=-1) @ self.mix)

    def logits(self, context: mx.array, state: mx.array) -> mx.array:
        return mx.concatenate([context, state], axis=-1) @ self.head

    def to_target(self, index: mx.array) -> mx.array:
        return index


class ScriptedDrafter(Unprepared):
    """Knows a text: finds its place by the target's hidden state and drafts what comes next there.

    ``shift`` 0 drafts the text itself (the oracle); another shift is wrong at every place.
    """

    def __init__(self, target: Target, text: list[int], shift: int = 0) -> None:
        _, hidden = target.forward(mx.array([text]), target.make_cache())
        self.places = hidden[0]  # [T, F]: at i, what the target knew when it picked token i + 1
        self.text = mx.array(text)
        self.vocabulary, self.shift = target.embed.weight.shape[0], shift

    def advance(self, embedding: mx.array, state: mx.array) -> mx.array:
        return state + 1  # counts the tokens read

    def logits(self, context: mx.array, state: mx.array) -> mx.array:
        place = nearest(context, self.places) + 1 + state[..., 0].astype(mx.int32)
        token = self.text[mx.minimum(place, self.text.size - 1)] + self.shift
        return mx.where(mx.arange(self.vocabulary) == (token % self.vocabulary)[..., None], 10.0, 0.0)

    def to_target(self, index: mx.array) -> mx.array:
        return index


class TableDrafter(Unprepared):
    """Knows the target's distribution after every short continuation of one prompt.

    Continuations are numbered breadth first: 0 is none, and adding token t to n gives n * V + t + 1.
    ``sign`` 1 drafts the likeliest continuations, -1 the least likely.
    """

    def __init__(self, target: Target, prompt: list[int], longest: int, sign: int = 1) -> None:
        self.size, self.sign = int(target.embed.weight.shape[0]), sign
        self.rows = target.embed.weight
        texts = np.array(list(itertools.product(range(self.size), repeat=longest)))
        ids = mx.array(np.concatenate([np.tile(prompt, (len(texts), 1)), texts], axis=1))
        logits, hidden = target.forward(ids, target.make_cache())
        first = len(prompt) - 1
        keep = [(n, slice(None, None, self.size ** (longest - n))) for n in range(longest + 1)]
        self.hidden = mx.concatenate([hidden[rows, first + n] for n, rows in keep])  # [nodes, F]
        self.table = mx.concatenate([logits[rows, first + n] for n, rows in keep])  # [nodes, V]

    def advance(self, embedding: mx.array, state: mx.array) -> mx.array:
        code, power = state[..., 0], mx.maximum(state[..., 1], 1)
        code = code * self.size + nearest(embedding, self.rows) + 1
        power = power * self.size
        return mx.stack([code, power, *([mx.zeros_like(code)] * (state.shape[-1] - 2))], axis=-1)

    def logits(self, context: mx.array, state: mx.array) -> mx.array:
        node = nearest(context, self.hidden) * state[..., 1] + state[..., 0]
        return self.sign * self.table[mx.minimum(node, self.table.shape[0] - 1).astype(mx.int32)]

    def to_target(self, index: mx.array) -> mx.array:
        return index


def nearest(vectors: mx.array, rows: mx.array) -> mx.array:
    """The row [M, F] nearest to each of the vectors [..., F]: [...] int32."""
    return mx.argmax(vectors @ rows.T - 0.5 * (rows * rows).sum(axis=-1), axis=-1).astype(mx.int32)
