"""Each architecture: a tiny mlx-lm model written as llama.cpp writes it, converted, with equal logits."""

import importlib
import math
import re
from pathlib import Path

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import load_model
from test_gguf import add_byte_level, permute
from test_stream import PROMPT, Silent, known

from mlx_redrafter import DraftShape, SpeculativeModel, stream_generate
from mlx_redrafter.loading.gguf import convert_gguf
from mlx_redrafter.loading.gguf.architectures import ARCHITECTURES

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 20000.0,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
GRANITE = {
    "logits_scaling": 2.0,
    "attention_multiplier": 0.125,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_bias": False,
    "mlp_bias": False,
}
SCALE_KEYS = {  # GraniteModel.set_gguf_parameters
    "attention.scale": 0.125,
    "embedding_scale": 3.0,
    "residual_scale": 0.5,
    "logit_scale": 2.0,
}
EXPERT_KEYS = {"expert_count": 4, "expert_used_count": 2}
WINDOW = {"attention.sliding_window": 4}
DELTA = {  # HF's config of gated delta nets, here with two value heads per key head
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "head_dim": 32,
}
DELTA_KEYS = {  # Qwen3NextModel.set_gguf_parameters
    "ssm.conv_kernel": 4,
    "ssm.state_size": 32,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 4,
    "ssm.inner_size": 128,
    "full_attention_interval": 2,
    "rope.dimension_count": 8,
    "attention.key_length": 32,
    "attention.value_length": 32,
}
ROPE = {"rope_parameters": {"type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.25}}
SECTIONS = {"rope.dimension_sections": [2, 1, 1, 0]}
SHARED = {"shared_expert_intermediate_size": 64}
SHARED_KEYS = {"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 64}
MAMBA = {f"mamba_{name}": n for name, n in (("n_heads", 4), ("d_head", 32), ("d_state", 16), ("d_conv", 4))}
MAMBA |= {"mamba_n_groups": 1, "mamba_conv_bias": True, "mamba_proj_bias": False}
MAMBA_KEYS = {  # Mamba2Model.set_gguf_parameters
    "ssm.conv_kernel": 4,
    "ssm.state_size": 16,
    "ssm.group_count": 1,
    "ssm.time_step_rank": 4,
    "ssm.inner_size": 128,
}
GRANITE_HYBRID = GRANITE | MAMBA | {"layer_types": ["mamba", "attention"]}
GRANITE_HYBRID |= {"position_embedding_type": "nope", "time_step_limit": [0.0, 1e9]}
GRANITE_HYBRID_KEYS = (
    SCALE_KEYS | MAMBA_KEYS | {"rope.scaling.finetuned": False, "attention.head_count_kv": [0, 2]}
)
NEMOTRON = {"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "conv_kernel": 4}
NEMOTRON |= {"n_groups": 2, "head_dim": 16, "layer_norm_epsilon": 1e-5, "use_conv_bias": True}
NEMOTRON |= dict.fromkeys(("attention_bias", "mlp_bias", "mamba_proj_bias", "use_bias"), False)
NEMOTRON_KEYS = MAMBA_KEYS | {
    "ssm.group_count": 2,
    "rope.dimension_count": 8,
    "attention.key_length": 16,
    "attention.value_length": 16,
}
# GGUF's architecture: mlx-lm's, entries of its config, metadata besides the usual. Both are written from
# llama.cpp's converter (its conversion/*.py), not from the table under test.
CASES = {
    "llama": ("llama", {"attention_bias": True}, {"rope.dimension_count": 16}),
    "mixtral": ("mixtral", LOCAL, EXPERT_KEYS),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {"head_dim": 32}, {"attention.key_length": 32, "attention.value_length": 32}),
    "qwen2moe": (
        "qwen2_moe",
        EXPERTS | {"shared_expert_intermediate_size": 64},
        EXPERT_KEYS | {"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 64},
    ),
    "qwen3moe": (
        "qwen3_moe",
        EXPERTS | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "head_dim": 32},
        EXPERT_KEYS
        | {"expert_feed_forward_length": 32, "attention.key_length": 32, "attention.value_length": 32},
    ),
    "gemma2": (
        "gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 3.0}
        | {"final_logit_softcapping": 2.0},
        {
            "attention.key_length": 32,
            "attention.value_length": 32,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        }
        | WINDOW,
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 4, "rope_local_base_freq": 10000.0}
        | {"num_hidden_layers": 7, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "attention.key_length": 32,
            "attention.value_length": 32,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        }
        | WINDOW,
    ),
    "phi3": (
        "phi3",
        {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 64, "head_dim": 16}
        | {"rope_scaling": {"type": "longrope", "long_factor": [1.0, 2, 3, 4], "short_factor": [1.0] * 4}},
        {"rope.dimension_count": 8, "rope.scaling.original_context_length": 64, "attention.sliding_window": 0}
        | {
            "rope.scaling.type": "longrope",
            "rope.scaling.attn_factor": (1 + math.log(4) / math.log(64)) ** 0.5,
        },
    ),
    "granite": ("granite", GRANITE, SCALE_KEYS | {"rope.dimension_count": 16}),
    "granitemoe": ("granitemoe", GRANITE | LOCAL, SCALE_KEYS | EXPERT_KEYS),
    "olmo2": ("olmo2", {}, {}),
    "olmoe": ("olmoe", EXPERTS, EXPERT_KEYS),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}, {"rope.dimension_count": 16}),
    "glm4": (
        "glm4",
        {"attention_bias": True, "head_dim": 16, "partial_rotary_factor": 0.5},
        {"rope.dimension_count": 8},
    ),
    "gpt-oss": (
        "gpt_oss",
        LOCAL | {"head_dim": 32, "intermediate_size": 32, "sliding_window": 4},
        EXPERT_KEYS
        | WINDOW
        | {"attention.key_length": 32, "attention.value_length": 32, "expert_feed_forward_length": 32},
    ),
    "exaone4": (
        "exaone4",
        {"head_dim": 16, "rope_scaling": None, "sliding_window": 4, "sliding_window_pattern": "LLG"}
        | {"num_hidden_layers": 4},
        WINDOW | {"attention.sliding_window_pattern": [True, True, False, True]},
    ),
    "command-r": (
        "cohere",
        {"logit_scale": 0.25, "layer_norm_eps": 1e-5, "use_qk_norm": True},
        {"logit_scale": 0.25, "rope.scaling.type": "none"},
    ),
    "cohere2": (
        "cohere2",
        {"logit_scale": 0.25, "layer_norm_eps": 1e-5, "head_dim": 16, "sliding_window": 4}
        | {"num_hidden_layers": 5},
        {"logit_scale": 0.25, "rope.dimension_count": 16} | WINDOW,
    ),
    "starcoder2": ("starcoder2", {"norm_epsilon": 1e-5, "tie_word_embeddings": True}, {}),
    "lfm2": (
        "lfm2",
        {"norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "full_attn_idxs": [1], "block_dim": 64}
        | {"block_ff_dim": 96, "block_multiple_of": 1, "block_ffn_dim_multiplier": 1.0}
        | {"block_auto_adjust_ff_dim": False},
        {"shortconv.l_cache": 3, "attention.head_count_kv": [0, 2]},
    ),
    "lfm2moe": (
        "lfm2_moe",
        EXPERTS
        | {"norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "full_attn_idxs": [1]}
        | {"use_expert_bias": True, "norm_topk_prob": True, "num_dense_layers": 1},
        EXPERT_KEYS
        | {"shortconv.l_cache": 3, "attention.head_count_kv": [0, 2], "expert_gating_func": 2}
        | {"expert_feed_forward_length": 32, "leading_dense_block_count": 1},
    ),
    "qwen3next": (
        "qwen3_next",
        EXPERTS
        | SHARED
        | DELTA
        | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
        | {"partial_rotary_factor": 0.25},
        EXPERT_KEYS | SHARED_KEYS | DELTA_KEYS,
    ),
    "qwen35": (
        "qwen3_5",
        DELTA | ROPE | {"num_hidden_layers": 4},
        DELTA_KEYS | SECTIONS | {"attention.recurrent_layers": [True, False] * 2},
    ),
    "qwen35moe": (
        "qwen3_5_moe",
        EXPERTS | SHARED | DELTA | ROPE,
        EXPERT_KEYS | SHARED_KEYS | DELTA_KEYS | SECTIONS,
    ),
    "falcon-h1": (
        "falcon_h1",
        MAMBA
        | {"mamba_d_ssm": 128, "mamba_n_groups": 2, "head_dim": 16}
        | {"embedding_multiplier": 1.0, "lm_head_multiplier": 1.0},
        MAMBA_KEYS | {"ssm.group_count": 2, "attention.key_length": 16, "attention.value_length": 16},
    ),
    "jamba": (
        "jamba",
        {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 0, "expert_layer_period": 1}
        | {"mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2, "mamba_dt_rank": 32}
        | {"num_experts": 1, "num_experts_per_tok": 1},
        {"ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 16, "ssm.time_step_rank": 32}
        | {"attention.head_count_kv": [0, 2], "expert_count": 1, "expert_used_count": 1},
    ),
    "granitehybrid": ("granitemoehybrid", GRANITE_HYBRID, GRANITE_HYBRID_KEYS | {"expert_count": 0}),
    "granitehybrid with experts": (
        "granitemoehybrid",
        GRANITE_HYBRID | LOCAL | {"shared_intermediate_size": 64, "position_embedding_type": "rope"},
        GRANITE_HYBRID_KEYS
        | EXPERT_KEYS
        | {"expert_shared_feed_forward_length": 64, "rope.scaling.finetuned": True},
    ),
    "nemotron_h": (
        "nemotron_h",
        NEMOTRON | {"hybrid_override_pattern": list("M-*-"), "num_hidden_layers": 4},
        NEMOTRON_KEYS | {"attention.head_count_kv": [0, 0, 2, 0], "feed_forward_length": [0, 96, 0, 96]},
    ),
    "nemotron_h_moe": (
        "nemotron_h",
        NEMOTRON
        | {"hybrid_override_pattern": list("ME*E"), "num_hidden_layers": 4, "n_routed_experts": 4}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1}
        | {"moe_shared_expert_intermediate_size": 64, "norm_topk_prob": True, "topk_group": 1}
        | {"routed_scaling_factor": 2.5},
        NEMOTRON_KEYS
        | EXPERT_KEYS
        | SHARED_KEYS
        | {"attention.head_count_kv": [0, 0, 2, 0], "feed_forward_length": [0, 32, 0, 32]}
        | {"expert_shared_count": 1, "expert_weights_norm": True, "expert_weights_scale": 2.5}
        | {"expert_group_count": 1},
    ),
}
INTERLEAVED = {"llama", "mixtral", "granite", "granitemoe", "smollm3"}  # LlamaModel's and those derived
INTERLEAVED |= {"granitehybrid", "granitehybrid with experts"}


def build(case: str, vocab: int):
    """Return mlx-lm's model with random weights in which nothing is alike, and its config."""
    model_type, entries, _ = CASES[case]
    config = COMMON | {"model_type": model_type, "vocab_size": vocab} | entries
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    mx.random.seed(1)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.update(
        tree_map(lambda x: mx.random.normal(x.shape) * 0.2 + (x if x.ndim == 1 else 0), model.parameters())
    )
    return model, config


def huggingface(name: str) -> str:
    """The name in the original checkpoint of a tensor that mlx-lm's ``sanitize`` renamed, for gguf's map."""
    for own, theirs in (
        ("mlp.switch_mlp.", "mlp.experts."),
        ("block_sparse_moe.switch_mlp.gate_proj", "block_sparse_moe.experts.w1"),
        ("block_sparse_moe.switch_mlp.down_proj", "block_sparse_moe.experts.w2"),
        ("block_sparse_moe.switch_mlp.up_proj", "block_sparse_moe.experts.w3"),
        ("feed_forward.switch_mlp.", "mlp.experts."),
        ("switch_mlp.fc1", "experts.up_proj"),
        ("switch_mlp.fc2", "experts.down_proj"),
        ("mixer.experts.", "mlp.experts."),
        ("language_model.", ""),
        (".dt_bias", ".dt_proj.bias"),
        (".expert_bias", ".expert_bias.bias"),
        (".e_score_correction_bias", ".e_score_correction.bias"),
    ):
        name = name.replace(own, theirs)
    return name.replace("backbone", "model") if ".mlp.experts." in name else name


def tiled(values: np.ndarray, keys: int, axis=0) -> np.ndarray:
    """The heads of values [keys, G], by their places in a group, as _LinearAttentionVReorderBase has them."""
    shape = values.shape
    return (
        values.reshape(*shape[:axis], keys, 2, -1, *shape[axis + 1 :]).swapaxes(axis, axis + 1).reshape(shape)
    )


def as_converted(case: str, name: str, values: np.ndarray, config) -> list[tuple[str, np.ndarray]]:
    """What llama.cpp's converter makes of a tensor of a recurrent model: names as for its map."""
    if name.endswith(("conv.conv.weight", "conv1d.weight")):
        values = values.squeeze(-1)
    if name.endswith(".A_log"):
        values = -np.exp(values)
    if case != "jamba" and re.search(r"(mamba|mixer)\.(A_log|D)$", name):  # Mamba2Model.modify_tensors
        values = values[:, None]
    if re.search(r"(mamba|mixer)\.norm\.weight", name):
        values = values.reshape(config.get("n_groups", config.get("mamba_n_groups")), -1)
    if "linear_attn" in name and case != "qwen3next":
        keys = config["linear_num_key_heads"]
        if ".out_proj." in name:
            values = tiled(values, keys, 1)
        elif re.search(r"in_proj_qkv|conv1d", name):
            q_k = 2 * keys * config["linear_key_head_dim"]
            values = np.concatenate([values[:q_k], tiled(values[q_k:], keys)])
        elif ".norm." not in name:
            values = tiled(values, keys)
    if "in_proj_qkvz" in name:  # Qwen3NextModel.modify_tensors
        parts = np.split(values.reshape(2, -1, values.shape[-1]), [32, 64, 128], axis=1)
        q, k, v, z = (part.reshape(-1, values.shape[-1]) for part in parts)
        return [
            (name.replace("qkvz", "qkv"), np.concatenate([q, k, v])),
            (name.replace("qkvz", "z"), z),
        ]
    if "shared_mlp.input_linear" in name:  # GraniteMoeModel.modify_tensors
        gate, up = np.split(values, 2)
        layer = name.split("shared_mlp")[0]
        return [
            (f"{layer}mlp.shared_expert.{x}_proj.weight", part) for x, part in (("gate", gate), ("up", up))
        ]
    return [(name, values)]


def write(path: Path, case: str, kind=Type.F32, fused=False):
    """Write the model as llama.cpp's converter does, ``fused`` as with its --fuse-qkv; return it."""
    arch = "llama" if case == "mixtral" else case.removesuffix(" with experts")
    writer = gguf.GGUFWriter(path, arch)
    _, vocab = add_byte_level(writer)
    model, config = build(case, vocab)
    layers = config["num_hidden_layers"]
    metadata = {
        "block_count": layers,
        "context_length": 256,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        "rope.freq_base": 20000.0,
    } | CASES[case][2]
    for key, value in metadata.items():
        if value is None:
            continue
        types = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            bool: writer.add_bool,
        }
        types.get(type(value), writer.add_array)(f"{arch}.{key}", value)
    if case == "phi3":
        writer.add_tensor("rope_factors_long.weight", np.array([1, 2, 3, 4], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.ones(4, np.float32))
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), layers
    )
    fusing: dict[str, list[np.ndarray]] = {".weight": [], ".bias": []}
    converted = (
        part
        for name, array in tree_flatten(model.parameters())
        for part in as_converted(case, name, np.array(array), config)
        if name != "lm_head.weight" or case not in ("gemma3", "starcoder2")
    )
    for name, values in converted:
        original = huggingface(name) + (".weight" if name.endswith("sinks") else "")
        gguf_name = names.get_name(original, (".weight", ".bias"))
        assert gguf_name, original
        if case in INTERLEAVED and (match := re.search(r"\.([qk])_proj\.", name)):
            values = permute(values, 4 if match[1] == "q" else 2)
        if case.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if name.endswith("shared_expert_gate.weight"):
            values = values.squeeze(0)  # as the writer drops no dimension, but llama.cpp's tensors are 1-D
        matrix = values.ndim > 1 and not re.search(
            r"norm|conv\.conv|conv1d|bias|(mlp|feed_forward|mixer)\.(gate|router)\.|A_log|\.D$", name
        )
        kinds = kind if matrix else Type.F32
        data = gguf.quants.quantize(values, kinds)
        if fused and re.search(r"attn_[qkv]\.", gguf_name):
            part = fusing[gguf_name[gguf_name.rindex(".") :]]
            part.append(data)
            if ".attn_v." not in gguf_name:
                continue
            gguf_name, data = gguf_name.replace("attn_v", "attn_qkv"), np.concatenate(part)
            part.clear()
        writer.add_tensor(gguf_name, data, raw_dtype=kinds)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def logits(model) -> np.ndarray:
    if hasattr(model, "tie_word_embeddings") and "lm_head" not in model:
        model.tie_word_embeddings = True
    return np.array(model(mx.array([[5, 7, 300, 20, 11, 12, 200, 3, 9]])).astype(mx.float32))


def test_every_architecture_has_a_case():
    assert {"llama" if case == "mixtral" else case for case in CASES} == set(ARCHITECTURES) - {
        "mistral",
        "llama with experts",
    }


@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path, case):
    model = write(tmp_path / "m.gguf", case)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    loaded, config = load_model(tmp_path / "out")
    assert config["torch_dtype"] == "float32"
    if case == "gemma3":
        model.pop("lm_head")
    np.testing.assert_allclose(logits(loaded), logits(model), atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_quantized_loads_in_one_dtype(tmp_path, case):
    write(tmp_path / "m.gguf", case, Type.Q8_0)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    model, config = load_model(tmp_path / "out")
    expected = "bfloat16" if case.startswith(("gemma", "gpt-oss", "nemotron")) else "float16"
    assert config["torch_dtype"] == expected
    assert model(mx.array([[5, 7]])).dtype == getattr(mx, expected)
    assert config["quantization"]["bits"] == 8


@pytest.mark.parametrize("case", ["qwen3next", "qwen35", "granitehybrid with experts"])
def test_what_is_cut_stacked_or_reordered_keeps_its_values_when_quantized(tmp_path, case):
    write(tmp_path / "m.gguf", case, Type.Q8_0)
    for quant in ("keep", "float"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / quant, quant=quant)
    kept, floats = (load_model(tmp_path / quant)[0] for quant in ("keep", "float"))
    kept.set_dtype(mx.float32)
    np.testing.assert_allclose(logits(kept), logits(floats), atol=0.1)  # norms are in float16 in one


@pytest.mark.parametrize("case", ["qwen3next", "qwen35", "falcon-h1", "granitehybrid", "nemotron_h"])
def test_a_recurrent_file_says_with_drafts_what_it_says_without(tmp_path, case):
    write(tmp_path / "m.gguf", case, Type.Q8_0)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    base, _ = load_model(tmp_path / "out")
    base.set_dtype(mx.float32)
    plain = [each.token for each in mlx_lm.stream_generate(base, Silent(), PROMPT, 24)]
    half = [*plain[:12], *plain[:12]]  # the drafter is right first, then wrong
    model = SpeculativeModel(base, known(base, PROMPT + half))
    drafted = list(stream_generate(model, Silent(), PROMPT, 24, shape=DraftShape(2, 4)))
    assert [each.token for each in drafted] == plain
    assert drafted[-1].steps < 22


def test_layers_that_predict_further_tokens_are_left_out(tmp_path, monkeypatch):
    further = {
        "block_count": 3,
        "nextn_predict_layers": 1,
        "attention.recurrent_layers": [True, False, False],
    }
    monkeypatch.setitem(CASES, "qwen35moe", (*CASES["qwen35moe"][:2], CASES["qwen35moe"][2] | further))
    header = gguf.GGUFWriter.write_header_to_file

    def with_layer(writer):
        writer.add_tensor("blk.2.attn_norm.weight", np.ones(64, np.float32))
        writer.add_tensor("blk.2.nextn.eh_proj.weight", np.ones((64, 128), np.float32))
        header(writer)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_layer)
    model = write(tmp_path / "m.gguf", "qwen35moe")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    np.testing.assert_allclose(logits(load_model(tmp_path / "out")[0]), logits(model), atol=1e-4)


def test_projections_of_different_types_do_not_become_one(tmp_path, monkeypatch):
    add = gguf.GGUFWriter.add_tensor

    def mixed(writer, name, data, raw_dtype=None):
        if "ffn_up_shexp" in name:
            data, raw_dtype = gguf.quants.dequantize(data, raw_dtype), Type.F32
        add(writer, name, data, raw_dtype=raw_dtype)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", mixed)
    write(tmp_path / "m.gguf", "granitehybrid with experts", Type.Q8_0)
    with pytest.raises(ValueError, match=r"ffn_gate_shexp.weight \(Q8_0 .* do not go together"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize("case", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0])
def test_a_fused_projection_is_cut(tmp_path, case, kind):
    for fused in (False, True):
        write(tmp_path / f"{fused}.gguf", case, kind, fused)
        convert_gguf(tmp_path / f"{fused}.gguf", tmp_path / f"{fused}")
    plain, cut = (load_model(tmp_path / f"{fused}")[0] for fused in (False, True))
    np.testing.assert_array_equal(logits(cut), logits(plain))


@pytest.mark.parametrize(
    ("case", "metadata", "message"),
    [
        ("gemma2", {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, "scaling 'linear'"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "capped at 30.0"),
        ("gemma3", {"attention.sliding_window_pattern": [True, False] + [True] * 5}, "in no order"),
        ("glm4", {"rope.dimension_sections": [8, 12, 12, 0]}, "images"),
        ("qwen3", {"attention.causal": False}, "embeddings"),
        ("qwen2moe", {"expert_used_count": 0}, "expert_used_count is 0"),
        ("granite", {"logit_scale": "two"}, "logit_scale is 'two', not a positive number"),
        ("gpt-oss", {"attention.sliding_window_pattern": [True]}, "not one truth for each layer"),
        ("llama", {"attention.head_count_kv": [1, 2]}, r"head_count_kv is \[1, 2\]"),
        ("mixtral", {"expert_count": 8}, "ffn_gate_inp.weight has shape"),
        ("qwen35", {"attention.recurrent_layers": [True, False, False, True]}, "in no order"),
        ("qwen35", {"attention.recurrent_layers": [True] * 4}, "with 4 layers, 4 value heads"),
        ("qwen3next", {"ssm.time_step_rank": 8}, "ssm_ba.weight has shape .* not 16 rows"),
        ("qwen3next", {"ssm.inner_size": 130}, "width of 130 in 4 heads"),
        ("qwen3next", {"nextn_predict_layers": 2}, "has 2 of 2 layers for more tokens"),
        ("granitehybrid", {"attention.head_count_kv": None}, "lacks the tensor blk.1.ssm_conv1d.weight"),
        ("granitehybrid", {"ssm.group_count": 2}, "norms of 2 groups"),
        ("granitehybrid", {"attention.head_count_kv": [0, 2, 2]}, "head_count_kv is"),
        ("nemotron_h_moe", {"expert_group_count": 4}, "4 groups of experts"),
    ],
)
def test_what_mlx_lm_would_not_compute_is_refused(tmp_path, monkeypatch, case, metadata, message):
    monkeypatch.setitem(CASES, case, (*CASES[case][:2], CASES[case][2] | metadata))
    write(tmp_path / "m.gguf", case)
    with pytest.raises(ValueError, match=message):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
