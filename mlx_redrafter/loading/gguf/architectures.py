"""What llama.cpp calls each architecture's numbers and tensors, and what mlx-lm calls them."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType
from mlx_lm.models.rope_utils import Llama3RoPE

from .reader import GGUFFile

Config = dict[str, Any]
Key = tuple[str, type, float | None]  # GGUF's name after "<architecture>.", its type, the default


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures as mlx-lm's model.

    Args:
        model_type: mlx-lm's name.
        layer: GGUF's tensor names in a layer (``blk.0.<name>.weight``) and mlx-lm's.
        top: the same outside of layers.
        keys: entries of config.json and the metadata they come from.
        constants: entries of config.json that every such model has.
        interleaved: the rows of q and k are interleaved, as llama.cpp does where its rotation is of pairs.
        plus_one: norms are stored with 1 added, which mlx-lm adds itself.
        scalings: the scalings of rotary positions that mlx-lm's model computes.
        root: the module of mlx-lm's that has the layers.
        mixed: layers are of several kinds; what some lack is listed for each layer, as 0 there.
        tiled: value heads of gated delta nets are stored in the order in which llama.cpp repeats key heads.
        dtype: in which it runs unless the file has floats; bfloat16 where activations overflow float16.
        more: returns further entries of config.json.
    """

    model_type: str
    layer: dict[str, str]
    top: dict[str, str]
    keys: dict[str, Key]
    constants: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False
    plus_one: bool = False
    scalings: tuple[str, ...] = ()
    root: str = "model"
    mixed: bool = False
    tiled: bool = False
    dtype: mx.Dtype = mx.float16
    more: Callable[[GGUFFile, str, Config], Config] = lambda *_: {}


# --- Tensors -----------------------------------------------------------------------------------------

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"} | {"attn_output": "self_attn.o_proj"}
_QK_NORMS = {f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"}
_MLP = {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_LAYER = _NORMS | _ATTENTION | _MLP
_AFTER = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA = (
    {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"} | _AFTER | _ATTENTION | _MLP
)
_AFTER_ONLY = _AFTER | _ATTENTION | _QK_NORMS | _MLP
_SHARED = {f"ffn_{x}_shexp": f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")} | {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate"
}


def _experts(block: str, gate: str = "gate", experts: str = "switch_mlp") -> dict[str, str]:
    names = {f"ffn_{x}_exps": f"{block}.{experts}.{x}_proj" for x in ("gate", "up", "down")}
    return names | {"ffn_gate_inp": f"{block}.{gate}"}


def _recurrent(block: str, **further: str) -> dict[str, str]:
    """The tensors of a Mamba-2 layer, and those that another kind has besides."""
    names = {"ssm_in": "in_proj", "ssm_conv1d": "conv1d", "ssm_norm": "norm", "ssm_out": "out_proj"}
    names |= {"ssm_dt.bias": "dt_bias", "ssm_a": "A_log", "ssm_d": "D"} | further
    return {gguf: f"{block}.{own}" for gguf, own in names.items()}


# mlx-lm's Qwen3.5 computes as its Qwen3-Next does, but has apart what GGUF has apart, in types of their own.
_DELTA_NET = (
    {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
    | _ATTENTION
    | _QK_NORMS
    | _recurrent(
        "linear_attn",
        attn_qkv="in_proj_qkv",
        attn_gate="in_proj_z",
        ssm_beta="in_proj_b",
        ssm_alpha="in_proj_a",
    )
)
_LANGUAGE_TOP = {gguf: f"language_model.{own}" for gguf, own in _TOP.items()}


# --- Metadata ----------------------------------------------------------------------------------------

_RMS: dict[str, Key] = {"rms_norm_eps": ("attention.layer_norm_rms_epsilon", float, None)}
_EXPERTS: dict[str, Key] = {
    "num_experts": ("expert_count", int, None),
    "num_experts_per_tok": ("expert_used_count", int, None),
    "moe_intermediate_size": ("expert_feed_forward_length", int, None),
}
_SHARED_WIDTH: dict[str, Key] = {
    "shared_expert_intermediate_size": ("expert_shared_feed_forward_length", int, None)
}
_DELTA_NETS: dict[str, Key] = {
    "linear_num_key_heads": ("ssm.group_count", int, None),
    "linear_num_value_heads": ("ssm.time_step_rank", int, None),
    "linear_key_head_dim": ("ssm.state_size", int, None),
    "linear_conv_kernel_dim": ("ssm.conv_kernel", int, None),
}
_MAMBA2: dict[str, Key] = {
    "mamba_n_heads": ("ssm.time_step_rank", int, None),
    "mamba_n_groups": ("ssm.group_count", int, None),
    "mamba_d_state": ("ssm.state_size", int, None),
    "mamba_d_conv": ("ssm.conv_kernel", int, None),
}
_LOCAL_EXPERTS = {
    "num_local_experts": _EXPERTS["num_experts"],
    "num_experts_per_tok": _EXPERTS["num_experts_per_tok"],
}
_GRANITE: dict[str, Key] = {
    "attention_multiplier": ("attention.scale", float, None),
    "embedding_multiplier": ("embedding_scale", float, None),
    "residual_multiplier": ("residual_scale", float, None),
    "logits_scaling": ("logit_scale", float, None),
}
_COHERE: dict[str, Key] = {
    "layer_norm_eps": ("attention.layer_norm_epsilon", float, None),
    "logit_scale": ("logit_scale", float, None),
}
_WINDOW = "attention.sliding_window"
_ALL_SCALINGS = ("linear", "yarn", "llama3", "longrope")


def positive(kind: type, metadata: Mapping[str, Any], key: str, default: float | None = None) -> Any:
    """Return a positive finite number of the metadata as ``kind``; ValueError if it is missing or not one."""
    value = metadata.get(key, default)
    if type(value) in (int, kind) and 0 < value < math.inf:
        return kind(value)
    wanted = "integer" if kind is int else "number"
    raise ValueError(f"GGUF metadata {key} is {value!r}, not a positive {wanted}: use another file.")


def _pattern(
    file: GGUFFile, arch: str, default: int, layers: int, of: str = f"{_WINDOW}_pattern"
) -> list[bool]:
    """Return which layers do not see all tokens: by default all but each ``default``-th."""
    key = f"{arch}.{of}"
    value = file.metadata.get(key, default)
    if type(value) is int and value > 0:
        return [(i + 1) % value != 0 for i in range(layers)]
    whole = isinstance(value, list) and len(value) == file.metadata[f"{arch}.block_count"]
    if whole and all(isinstance(local, bool) for local in value):
        return list(value[:layers])
    raise ValueError(f"GGUF metadata {key} is {value!r}, not one truth for each layer: use another file.")


def _period(pattern: list[bool], arch: str) -> int:
    """Return p where each p-th layer sees all tokens and the others do not."""
    period = [*pattern, False].index(False) + 1
    if pattern != [(i + 1) % period != 0 for i in range(len(pattern))]:
        raise ValueError(f"GGUF {arch}: its kinds of layers are in no order that mlx-lm's model has.")
    return period


def _gemma(file: GGUFFile, arch: str, config: Config) -> Config:
    big = config["num_hidden_layers"] == (46 if arch == "gemma2" else 62)  # 27B, as llama.cpp tells it
    scale = config["hidden_size"] // config["num_attention_heads"] if big else config["head_dim"]
    return {"query_pre_attn_scalar": scale}


def _gemma3(file: GGUFFile, arch: str, config: Config) -> Config:
    if cap := file.metadata.get("gemma3.final_logit_softcapping"):
        raise ValueError(f"GGUF gemma3 with logits capped at {cap!r}: mlx-lm's model has no such thing.")
    layers, window = config["num_hidden_layers"], file.metadata.get(f"gemma3.{_WINDOW}")
    windows: Config = {"sliding_window_pattern": 1}
    if window:
        windows = {
            "sliding_window": positive(int, file.metadata, f"gemma3.{_WINDOW}"),
            "sliding_window_pattern": _period(_pattern(file, arch, 6, layers), arch),
        }
    return _gemma(file, arch, config) | windows


def _gpt_oss(file: GGUFFile, arch: str, config: Config) -> Config:
    kinds = ("full_attention", "sliding_attention")
    return {"layer_types": [kinds[x] for x in _pattern(file, arch, 2, config["num_hidden_layers"])]}


def _exaone4(file: GGUFFile, arch: str, config: Config) -> Config:
    layers = config["num_hidden_layers"]
    if not (file.metadata.get(f"{arch}.{_WINDOW}") or layers == 64):  # the 32B of llama.cpp's first files
        return {"sliding_window": None, "sliding_window_pattern": None}
    pattern = "".join("GL"[local] for local in _pattern(file, arch, 4, layers))
    return {
        "sliding_window": positive(int, file.metadata, f"{arch}.{_WINDOW}", 4096),
        "sliding_window_pattern": pattern,
    }


def _cohere2(file: GGUFFile, arch: str, config: Config) -> Config:
    return {"sliding_window_pattern": _period(_pattern(file, arch, 4, config["num_hidden_layers"]), arch)}


def _phi3(file: GGUFFile, arch: str, config: Config) -> Config:
    if "rope_factors_long.weight" not in file.tensors:
        return {}
    long, short = (_factors(file, f"rope_factors_{x}.weight", config).tolist() for x in ("long", "short"))
    scaling = {"type": "longrope", "rope_type": "longrope", "long_factor": long, "short_factor": short}
    key = f"{arch}.rope.scaling.original_context_length"
    return {
        "rope_scaling": scaling,
        "original_max_position_embeddings": positive(int, file.metadata, key, 4096),
    }


def _lfm2(file: GGUFFile, arch: str, config: Config) -> Config:
    heads = _each(file, f"{arch}.attention.head_count_kv", config)
    return {
        "full_attn_idxs": [i for i, count in enumerate(heads) if count],
        "block_dim": config["hidden_size"],
        "block_ff_dim": config["intermediate_size"],
    }


def _each(file: GGUFFile, key: str, config: Config) -> list[Any]:
    """Return a number for each layer, where the metadata may have one for all."""
    value, layers = file.metadata.get(key), config["num_hidden_layers"]
    return value[:layers] if isinstance(value, list) else [value] * layers


def _delta_net(file: GGUFFile, arch: str, config: Config) -> Config:
    values, layers = config["linear_num_value_heads"], config["num_hidden_layers"]
    default = positive(int, file.metadata, f"{arch}.full_attention_interval", 4)
    period = _period(_pattern(file, arch, default, layers, "attention.recurrent_layers"), arch)
    if period > layers or values % config["linear_num_key_heads"]:
        raise ValueError(f"GGUF {arch} with {layers} layers, {values} value heads: mlx-lm has no such model.")
    rope = {"type": "default", "rope_theta": config["rope_theta"]}
    rope["partial_rotary_factor"] = config["partial_rotary_factor"]
    return {
        "full_attention_interval": period,
        "linear_value_head_dim": _head_dim(file, arch),
        "rope_parameters": rope | config.get("rope_scaling", {}),
    }


def _head_dim(file: GGUFFile, arch: str) -> int:
    """Return the size of the heads of a recurrent layer."""
    inner: int = positive(int, file.metadata, f"{arch}.ssm.inner_size")
    heads: int = positive(int, file.metadata, f"{arch}.ssm.time_step_rank")
    if inner % heads:
        raise ValueError(f"GGUF {arch} has a recurrent width of {inner} in {heads} heads: use another file.")
    return inner // heads


def _falcon_h1(file: GGUFFile, arch: str, config: Config) -> Config:
    return _mamba2(file, arch, config) | {"mamba_rms_norm": _has(file, "ssm_norm.weight")}


def _mamba2(file: GGUFFile, arch: str, config: Config) -> Config:
    if (groups := config["mamba_n_groups"]) > 1 and _has(file, "ssm_norm.weight"):
        raise ValueError(f"GGUF {arch} with norms of {groups} groups: mlx-lm's model has one for all.")
    return {"mamba_d_head": _head_dim(file, arch), "mamba_conv_bias": _has(file, "ssm_conv1d.bias")}


def _jamba(file: GGUFFile, arch: str, config: Config) -> Config:
    inner, hidden = positive(int, file.metadata, f"{arch}.ssm.inner_size"), config["hidden_size"]
    if inner % hidden:
        raise ValueError(f"GGUF {arch} with a recurrent width of {inner} for {hidden}: use another file.")
    heads = _each(file, f"{arch}.attention.head_count_kv", config)
    kinds = ["attention" if count else "mamba" for count in heads]
    return {"mamba_expand": inner // hidden, "layers_block_type": kinds}


def _granite_hybrid(file: GGUFFile, arch: str, config: Config) -> Config:
    heads = _each(file, f"{arch}.attention.head_count_kv", config)
    rotated = file.metadata.get(f"{arch}.rope.scaling.finetuned", True)  # what the key means there
    return _mamba2(file, arch, config) | {
        "layer_types": ["attention" if count else "mamba" for count in heads],
        "position_embedding_type": "rope" if rotated else "nope",
    }


def _nemotron_h(file: GGUFFile, arch: str, config: Config) -> Config:
    counts = (
        _each(file, f"{arch}.{key}", config) for key in ("attention.head_count_kv", "feed_forward_length")
    )
    wide = "E" if "n_routed_experts" in config else "-"
    norm = f"{arch}.attention.layer_norm_epsilon"
    eps = file.metadata.get(norm.replace("norm_eps", "norm_rms_eps"), file.metadata.get(norm))
    return {
        "hybrid_override_pattern": [
            wide if width else "*" if heads else "M" for heads, width in zip(*counts, strict=True)
        ],
        "layer_norm_epsilon": positive(float, {norm: eps}, norm),
        "mamba_head_dim": _head_dim(file, arch),
        "use_conv_bias": _has(file, "ssm_conv1d.bias"),
        "mlp_bias": _has(file, "ffn_up.bias"),
    }


def _nemotron_h_moe(file: GGUFFile, arch: str, config: Config) -> Config:
    groups = file.metadata.get(f"{arch}.expert_group_count", 1)
    if groups not in (0, 1):
        raise ValueError(
            f"GGUF {arch} with {groups!r} groups of experts is not supported: convert the HF repo."
        )
    return _nemotron_h(file, arch, config) | {
        "norm_topk_prob": bool(file.metadata.get(f"{arch}.expert_weights_norm")),
        "moe_latent_size": file.metadata.get(f"{arch}.moe_latent_size"),
        "n_group": 1,
        "topk_group": 1,
    }


def _has(file: GGUFFile, name: str) -> bool:
    """Whether a layer has this tensor."""
    return any(tensor.endswith(f".{name}") for tensor in file.tensors)


_LLAMA = Architecture("llama", _LAYER, _TOP, _RMS, interleaved=True, scalings=_ALL_SCALINGS)
_UNMIXED = replace(_LLAMA, interleaved=False)
_DELTA = Architecture(
    "qwen3_5",
    _DELTA_NET | _MLP,
    _LANGUAGE_TOP,
    _RMS | _DELTA_NETS,
    {"partial_rotary_factor": 1.0},
    scalings=_ALL_SCALINGS,
    root="language_model.model",
    tiled=True,
    more=_delta_net,
)
_DELTA_EXPERTS = replace(
    _DELTA,
    model_type="qwen3_5_moe",
    layer=_DELTA_NET | _experts("mlp") | _SHARED,
    keys=_DELTA.keys | _EXPERTS | _SHARED_WIDTH,
)
_LFM2 = Architecture(
    "lfm2",
    {
        "attn_norm": "operator_norm",
        "ffn_norm": "ffn_norm",
        "attn_q_norm": "self_attn.q_layernorm",
        "attn_k_norm": "self_attn.k_layernorm",
        "shortconv.conv": "conv.conv",
        "shortconv.in_proj": "conv.in_proj",
        "shortconv.out_proj": "conv.out_proj",
        "ffn_gate": "feed_forward.w1",
        "ffn_up": "feed_forward.w3",
        "ffn_down": "feed_forward.w2",
    }
    | _ATTENTION
    | {"attn_output": "self_attn.out_proj"},
    {"token_embd": "model.embed_tokens", "token_embd_norm": "model.embedding_norm"},
    {
        "norm_eps": ("attention.layer_norm_rms_epsilon", float, None),
        "conv_L_cache": ("shortconv.l_cache", int, None),
    },
    {
        "conv_bias": False,
        "block_multiple_of": 1,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    mixed=True,
    more=_lfm2,
)
_GRANITE_HYBRID = replace(
    _LLAMA,
    model_type="granitemoehybrid",
    layer=_LAYER | _recurrent("mamba"),
    keys=_RMS | _GRANITE | _MAMBA2,
    constants={"mamba_proj_bias": False, "time_step_limit": [0.0, 1e9]},  # none, as in the original
    scalings=(),
    mixed=True,
    more=_granite_hybrid,
)
_NEMOTRON_H = Architecture(
    "nemotron_h",
    {"attn_norm": "norm", "attn_output": "mixer.o_proj", "ffn_up": "mixer.up_proj"}
    | {f"attn_{x}": f"mixer.{x}_proj" for x in "qkv"}
    | {"ffn_down": "mixer.down_proj"}
    | _recurrent("mixer"),
    {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"},
    {
        "mamba_num_heads": ("ssm.time_step_rank", int, None),
        "n_groups": ("ssm.group_count", int, None),
        "ssm_state_size": ("ssm.state_size", int, None),
        "conv_kernel": ("ssm.conv_kernel", int, None),
    },
    {
        "mamba_proj_bias": False,
        "use_bias": False,
        "partial_rotary_factor": 1.0,
    },  # of none: there are no positions
    root="backbone",
    mixed=True,
    dtype=mx.bfloat16,  # squares of what is passed on may overflow float16
    more=_nemotron_h,
)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "llama with experts": replace(
        _LLAMA,
        model_type="mixtral",
        layer=_NORMS | _ATTENTION | _experts("block_sparse_moe"),
        keys=_RMS | _LOCAL_EXPERTS,
        scalings=(),
    ),
    "qwen2": replace(_UNMIXED, model_type="qwen2"),
    "qwen3": replace(_UNMIXED, model_type="qwen3", layer=_LAYER | _QK_NORMS),
    "qwen2moe": Architecture(
        "qwen2_moe",
        _NORMS | _ATTENTION | _experts("mlp") | _SHARED,
        _TOP,
        _RMS | _EXPERTS | _SHARED_WIDTH,
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        _NORMS | _ATTENTION | _QK_NORMS | _experts("mlp"),
        _TOP,
        _RMS | _EXPERTS,
        {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
        scalings=_ALL_SCALINGS,
    ),
    "gemma2": Architecture(
        "gemma2",
        _GEMMA,
        _TOP,
        _RMS
        | {
            "attn_logit_softcapping": ("attn_logit_softcapping", float, 50.0),
            "final_logit_softcapping": ("final_logit_softcapping", float, 30.0),
        },
        plus_one=True,
        dtype=mx.bfloat16,
        more=_gemma,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        _GEMMA | _QK_NORMS,
        _TOP,
        _RMS | {"rope_local_base_freq": ("rope.freq_base_swa", float, 10000.0)},
        plus_one=True,
        scalings=_ALL_SCALINGS,
        dtype=mx.bfloat16,
        more=_gemma3,
    ),
    "phi3": Architecture(
        "phi3",
        _NORMS
        | {
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        _TOP,
        _RMS,
        {"partial_rotary_factor": 1.0},
        scalings=("linear",),
        more=_phi3,
    ),
    "granite": replace(_LLAMA, model_type="granite", keys=_RMS | _GRANITE),
    "granitemoe": replace(
        _LLAMA,
        model_type="granitemoe",
        layer=_NORMS | _ATTENTION | _experts("block_sparse_moe", "router.layer"),
        keys=_RMS | _GRANITE | _LOCAL_EXPERTS,
    ),
    "olmo2": replace(_UNMIXED, model_type="olmo2", layer=_AFTER_ONLY),
    "olmoe": replace(
        _UNMIXED,
        model_type="olmoe",
        layer=_NORMS | _ATTENTION | _QK_NORMS | _experts("mlp"),
        keys=_RMS | {name: _EXPERTS[name] for name in ("num_experts", "num_experts_per_tok")},
    ),
    "smollm3": replace(_LLAMA, model_type="smollm3"),
    "glm4": Architecture(
        "glm4",
        {
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_self_attn_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        }
        | _ATTENTION,
        _TOP,
        _RMS,
        {"partial_rotary_factor": 1.0},
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        {
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks.weight": "self_attn.sinks",
        }
        | _ATTENTION
        | _experts("mlp", "router", "experts"),
        _TOP,
        _RMS
        | _LOCAL_EXPERTS
        | {
            "intermediate_size": ("expert_feed_forward_length", int, None),
            "sliding_window": (_WINDOW, int, None),
        },
        scalings=_ALL_SCALINGS,
        dtype=mx.bfloat16,
        more=_gpt_oss,
    ),
    "exaone4": replace(
        _UNMIXED,
        model_type="exaone4",
        layer=_AFTER_ONLY,
        constants={"rope_scaling": None},
        more=_exaone4,
    ),
    "command-r": Architecture(
        "cohere",
        {"attn_norm": "input_layernorm"} | _ATTENTION | _QK_NORMS | _MLP,
        _TOP,
        _COHERE,
        more=lambda file, _, __: {"use_qk_norm": "blk.0.attn_q_norm.weight" in file.tensors},
    ),
    "cohere2": Architecture(
        "cohere2",
        {"attn_norm": "input_layernorm"} | _ATTENTION | _MLP,
        _TOP,
        _COHERE | {"sliding_window": (_WINDOW, int, None)},
        more=_cohere2,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        _NORMS | _ATTENTION | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        _TOP,
        {"norm_epsilon": ("attention.layer_norm_epsilon", float, None)},
    ),
    "lfm2": _LFM2,
    "lfm2moe": replace(
        _LFM2,
        model_type="lfm2_moe",
        layer=_LFM2.layer
        | {f"ffn_{x}": f"feed_forward.{x}_proj" for x in ("gate", "up", "down")}
        | _experts("feed_forward")
        | {"exp_probs_b.bias": "feed_forward.expert_bias"},
        keys=_LFM2.keys
        | _EXPERTS
        | {
            "num_dense_layers": ("leading_dense_block_count", int, None),
            "routed_scaling_factor": ("expert_weights_scale", float, 1.0),
        },
        constants={"conv_bias": False, "norm_topk_prob": True, "use_expert_bias": True},
    ),
    "qwen35": _DELTA,
    "qwen35moe": _DELTA_EXPERTS,
    "qwen3next": replace(_DELTA_EXPERTS, tiled=False),
    "falcon-h1": Architecture(
        "falcon_h1",
        {"attn_norm": "input_layernorm"}
        | dict.fromkeys(("ffn_norm", "ffn_norm.weight"), "pre_ff_layernorm.weight")
        | {f"ffn_{x}": f"feed_forward.{x}_proj" for x in ("gate", "up", "down")}
        | _ATTENTION
        | _recurrent("mamba"),
        _TOP | {"output_norm": "model.final_layernorm"},
        _RMS | _MAMBA2 | {"mamba_d_ssm": ("ssm.inner_size", int, None)},
        {"embedding_multiplier": 1.0, "lm_head_multiplier": 1.0},  # they are in the weights
        more=_falcon_h1,
    ),
    "jamba": Architecture(  # without experts, of which mlx-lm's model has other ones
        "jamba",
        {"attn_norm": "input_layernorm", "ffn_norm": "pre_ff_layernorm"}
        | {f"ffn_{x}": f"feed_forward.{x}_proj" for x in ("gate", "up", "down")}
        | _ATTENTION
        | {"ssm_in": "mamba.in_proj", "ssm_conv1d": "mamba.conv1d", "ssm_out": "mamba.out_proj"}
        | {"ssm_x": "mamba.x_proj", "ssm_dt": "mamba.dt_proj", "ssm_a": "mamba.A_log", "ssm_d": "mamba.D"}
        | {f"ssm_{x}_norm": f"mamba.{x}_layernorm" for x in ("dt", "b", "c")},
        _TOP | {"output_norm": "model.final_layernorm"},
        _RMS
        | {
            "mamba_d_conv": ("ssm.conv_kernel", int, None),
            "mamba_d_state": ("ssm.state_size", int, None),
            "mamba_dt_rank": ("ssm.time_step_rank", int, None),
        },
        dict.fromkeys(("attn_layer_period", "expert_layer_period", "num_experts", "num_experts_per_tok"), 1)
        | {"attn_layer_offset": 0, "expert_layer_offset": 0},
        mixed=True,
        more=_jamba,
    ),
    "granitehybrid": _GRANITE_HYBRID,
    "granitehybrid with experts": replace(
        _GRANITE_HYBRID,
        layer=_NORMS
        | _ATTENTION
        | _experts("block_sparse_moe", "router.layer")
        | {f"ffn_{x}_shexp": "shared_mlp.input_linear" for x in ("gate", "up")}
        | {"ffn_down_shexp": "shared_mlp.output_linear"}
        | _recurrent("mamba"),
        keys=_GRANITE_HYBRID.keys
        | _LOCAL_EXPERTS
        | {"shared_intermediate_size": _SHARED_WIDTH["shared_expert_intermediate_size"]},
    ),
    "nemotron_h": _NEMOTRON_H,
    "nemotron_h_moe": replace(
        _NEMOTRON_H,
        layer=_NEMOTRON_H.layer
        | {"ffn_up_exps": "mixer.switch_mlp.fc1", "ffn_down_exps": "mixer.switch_mlp.fc2"}
        | {f"ffn_{x}_shexp": f"mixer.shared_experts.{x}_proj" for x in ("up", "down")}
        | {"ffn_latent_down": "mixer.fc1_latent_proj", "ffn_latent_up": "mixer.fc2_latent_proj"}
        | {"ffn_gate_inp": "mixer.gate", "exp_probs_b.bias": "mixer.gate.e_score_correction_bias"},
        keys=_NEMOTRON_H.keys
        | {
            "n_routed_experts": _EXPERTS["num_experts"],
            "num_experts_per_tok": _EXPERTS["num_experts_per_tok"],
            "moe_intermediate_size": _EXPERTS["moe_intermediate_size"],
            "moe_shared_expert_intermediate_size": _SHARED_WIDTH["shared_expert_intermediate_size"],
            "n_shared_experts": ("expert_shared_count", int, None),
            "routed_scaling_factor": ("expert_weights_scale", float, 1.0),
        },
        more=_nemotron_h_moe,
    ),
}


def architecture_of(file: GGUFFile) -> Architecture:
    """Return the architecture of a file; a ValueError names one that is not supported."""
    name = file.metadata.get("general.architecture")
    experts = f"{name} with experts"
    if (
        experts in ARCHITECTURES
        and f"{name}.expert_count" in file.metadata
        and file.metadata[f"{name}.expert_count"]
    ):
        return ARCHITECTURES[experts]
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"GGUF architecture {name!r} is not supported ({known} are): convert the HF repo.")
    return ARCHITECTURES[name]


def config_of(file: GGUFFile, architecture: Architecture) -> Config:
    """Return the config.json that the metadata and the tensors describe.

    Raises:
        ValueError: a feature of it that mlx-lm's model would not compute.
    """
    metadata, arch = file.metadata, str(file.metadata["general.architecture"])
    heads = positive(int, metadata, f"{arch}.attention.head_count")
    hidden = positive(int, metadata, f"{arch}.embedding_length")
    head_dim = positive(int, metadata, f"{arch}.attention.key_length", hidden // heads)
    layers = positive(int, metadata, f"{arch}.block_count")
    more_heads = metadata.get(f"{arch}.nextn_predict_layers", 0)  # layers that predict further tokens
    if type(more_heads) is not int or not 0 <= more_heads < layers:
        raise ValueError(
            f"GGUF {arch} has {more_heads!r} of {layers} layers for more tokens: use another file."
        )
    if "token_embd.weight" not in file.tensors:
        raise ValueError("The GGUF has no tensor token_embd.weight: it is not a whole language model.")
    config: Config = {
        "model_type": architecture.model_type,
        "architectures": [f"{architecture.model_type.title().replace('_', '')}ForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers - more_heads,
        "num_attention_heads": heads,
        "num_key_value_heads": _per_layer(file, architecture, f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": positive(int, metadata, f"{arch}.context_length"),
        "rope_theta": positive(float, metadata, f"{arch}.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": _has(file, "attn_q.bias") or _has(file, "attn_qkv.bias"),
        "mlp_bias": _has(file, "ffn_gate.bias"),
        **architecture.constants,
    }
    for name, (key, kind, default) in architecture.keys.items():
        config[name] = positive(kind, metadata, f"{arch}.{key}", default)
    if "intermediate_size" not in config:
        wide = config.get("moe_intermediate_size")  # such a file may have no dense layer
        config["intermediate_size"] = _per_layer(file, architecture, f"{arch}.feed_forward_length", wide)
    _check_heads(metadata, arch, config)
    if scaling := _rope_scaling(file, arch, config):
        if (kind := scaling["rope_type"]) not in architecture.scalings:
            raise ValueError(
                f"GGUF {arch} with rope scaling {kind!r}: mlx-lm's {config['model_type']} has none."
            )
        config["rope_scaling"] = scaling
    config |= architecture.more(file, arch, config)
    window = metadata.get(f"{arch}.{_WINDOW}")
    if window and "sliding_window" not in config:
        print(f"warning: sliding window of {window} ignored, mlx-lm attends to all tokens.", file=sys.stderr)
    return config


def _per_layer(file: GGUFFile, architecture: Architecture, key: str, default: int | None) -> int:
    """Return a count that some list for each layer, where layers are of several kinds as 0 for some."""
    value = file.metadata.get(key, default)
    if isinstance(value, list) and len(value) == file.metadata[f"{key.partition('.')[0]}.block_count"]:
        counts = set(value) - ({0} if architecture.mixed else set())
        value = counts.pop() if len(counts) == 1 else value
    return int(positive(int, {key: value}, key))


def _check_heads(metadata: Mapping[str, Any], arch: str, config: Config) -> None:
    """Refuse heads that mlx-lm has no form for; note the part of each that is rotated."""
    head_dim = config["head_dim"]
    images = metadata.get(f"{arch}.rope.dimension_sections") and not arch.startswith(
        "qwen35"
    )  # text is plain
    if images or metadata.get(f"{arch}.attention.causal") is False:
        raise ValueError(f"GGUF {arch} of images or for embeddings: only text generators are supported.")
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        dim = metadata.get(key, head_dim)
        if "partial_rotary_factor" in config and key.endswith("dimension_count"):
            config["partial_rotary_factor"] = positive(int, metadata, key, head_dim) / head_dim
            dim = min(head_dim, int(dim))
        if dim != head_dim and "partial_rotary_factor" not in config:
            raise ValueError(f"GGUF {key} is {dim!r} but heads have {head_dim}: convert the HF repo instead.")


def _rope_scaling(file: GGUFFile, arch: str, config: Config) -> Config | None:
    metadata, prefix = file.metadata, f"{arch}.rope.scaling"
    original, context = f"{prefix}.original_context_length", config["max_position_embeddings"]
    if "rope_freqs.weight" in file.tensors:
        return _scaling_of_factors(file, config, positive(int, metadata, original, 8192))
    old = f"{arch}.rope.scale_linear"
    kind = metadata.get(f"{prefix}.type", "linear" if old in metadata else "none")
    if kind == "none" or (kind == "longrope" and "rope_factors_long.weight" in file.tensors):
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"GGUF rope scaling {kind!r} is not supported: convert the HF repo instead.")
    factor = positive(float, metadata, old if old in metadata else f"{prefix}.factor")
    scaling = {"type": kind, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = positive(int, metadata, original, context)
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            scaling[name] = positive(float, metadata, f"{prefix}.yarn_{name}", default)
    return scaling


def _factors(file: GGUFFile, name: str, config: Config) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return what the rotary frequencies are divided by, one factor for each: [rotated / 2]."""
    half = int(config["head_dim"] * config.get("partial_rotary_factor", 1)) // 2
    tensor = file.tensors.get(name)
    if tensor is None or tensor.type != GGMLQuantizationType.F32 or tensor.shape != (half,):
        found = "missing" if tensor is None else f"{tensor.type.name} {tensor.shape}"
        raise ValueError(f"GGUF {name} is {found}, not F32 ({half},): use another file.")
    factors: np.ndarray[Any, np.dtype[np.float64]] = tensor.rows.view(np.float32)[0].astype(np.float64)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        wrong = next(x for x in factors if not 0 < x < math.inf)
        raise ValueError(f"GGUF {name} holds {wrong}, not positive numbers only: get the file again.")
    return factors


def _scaling_of_factors(file: GGUFFile, config: Config, original: int) -> Config:
    """Return the rope scaling that divides the frequencies by ``rope_freqs.weight`` [head_dim / 2].

    GGUF stores Llama 3's scaling as these factors only. Its parameters are recovered by comparing;
    factors that are not Llama 3's are kept as they are, which mlx-lm calls longrope.
    """
    factors = _factors(file, "rope_freqs.weight", config)
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    dims, base = config["head_dim"], config["rope_theta"]
    llama3 = Llama3RoPE(dims, base=base, scaling_config=scaling)
    unscaled = base ** (np.arange(0, dims, 2) / dims)
    if np.allclose(factors, np.array(llama3._freqs) / unscaled, rtol=1e-4):
        return scaling
    return {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "original_max_position_embeddings": config["max_position_embeddings"],  # equal: no magnitude scale
    }
