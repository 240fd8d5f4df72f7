"""The context that a config.json gives, before or after rotary scaling."""

from pathlib import Path

import pytest
from bundles import make_folder

import mlx_redrafter as r
from mlx_redrafter.model import _context_length

FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
ORIGINAL = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 64}
CONTEXTS = {
    "none": ({"max_position_embeddings": 64}, 64),
    "not stated": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, None),
    "null": ({"max_position_embeddings": 64, "rope_scaling": None, "rope_parameters": None}, 64),
    "yarn": ({"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 256),
    "yarn of an original": (
        {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "factor": 4, ORIGINAL: 64}},
        256,
    ),
    "yarn, both stated": (
        {"max_position_embeddings": 256, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64}},
        256,
    ),
    "yarn, more than the original": (
        {"max_position_embeddings": 80, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64}},
        256,
    ),
    "linear": ({"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2.5}}, 160),
    "dynamic": ({"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 128),
    "rope_parameters": (
        {
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        },
        128,
    ),
    "by layer type": (
        {
            "max_position_embeddings": 64,
            "rope_parameters": {
                "full_attention": {"rope_type": "yarn", "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        256,
    ),
    "llama3, scaled": ({"max_position_embeddings": 512, "rope_scaling": LLAMA3}, 512),
    "llama3, unscaled": ({"max_position_embeddings": 64, "rope_scaling": LLAMA3}, 512),
    "llama3 without an original": (
        {"max_position_embeddings": 512, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        512,
    ),
    "longrope, scaled": (
        {"max_position_embeddings": 512, "rope_scaling": {"type": "longrope", **FACTORS}, ORIGINAL: 64},
        512,
    ),
    "longrope, unscaled": (
        {
            "max_position_embeddings": 64,
            "rope_scaling": {"type": "longrope", "factor": 8.0, **FACTORS},
            ORIGINAL: 64,
        },
        512,
    ),
    "nested": (
        {"text_config": {"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2.0}}},
        128,
    ),
    "nested under nulls": (
        {
            "rope_scaling": None,
            "text_config": {"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": 2}},
        },
        128,
    ),
    "gemma3": (
        {
            "model_type": "gemma3_text",
            "max_position_embeddings": 512,
            "rope_scaling": {"type": "linear", "factor": 8.0},
        },
        512,
    ),
    "mrope": (
        {"max_position_embeddings": 64, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        64,
    ),
    "no number": (
        {"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": float("nan")}},
        64,
    ),
    "a factor as text": (
        {"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": "4"}},
        64,
    ),
    "another form": ({"max_position_embeddings": 64, "rope_scaling": [1, 2]}, 64),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_the_context_of_a_config(name):
    config, expected = CONTEXTS[name]
    assert _context_length(config, Path("model")) == expected


@pytest.mark.parametrize("kind", ["linear", "yarn", "dynamic"])
def test_a_prompt_may_fill_the_scaled_context(tmp_path, kind):
    folder = make_folder(
        tmp_path / "m", kind="random", max_position_embeddings=64, rope_scaling={"type": kind, "factor": 4.0}
    )
    model, tokenizer = r.load(folder, drafter=None)
    for draft in (True, False):
        assert next(r.stream_generate(model, tokenizer, [5] * 200, 1, draft=draft)).prompt_tokens == 200
    with pytest.raises(
        ValueError, match="300 tokens, more than the model's context of 256: shorten it, or set"
    ):
        next(r.stream_generate(model, tokenizer, [5] * 300, 1))
