"""GGUF files of the Llama family, converted without loss to folders that mlx-lm loads."""

import json
import math
import mmap
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from mlx_redrafter.tokenizers import gguf_ends, load_tokenizer, write_gguf_tokenizer

# --- Reading -----------------------------------------------------------------------------------------

# By GGUFValueType's numbers; 8 and 9, strings and arrays, are read piece by piece.
_SCALARS = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "", "", "<u8", "<i8", "<f8")


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: its name, type, shape (rows first, as in MLX) and bytes [rows, bytes per row]."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    rows: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class GGUFFile:
    """The metadata and the tensors (views of the mapped file) of a GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class _Cursor:
    """Reads little-endian values off a buffer and never past its end."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self.data = data
        self.position = 0

    def take(self, size: int) -> bytes:
        """Return the next ``size`` bytes; a ValueError if there are fewer."""
        start, self.position = self.position, self.position + size
        if self.position > len(self.data):
            raise ValueError("the file ends too early")
        return self.data[start : self.position].tobytes()

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        return str(self.take(self.integer(8)), "utf-8")

    def value(self) -> Any:
        """Return a metadata value: a type and then a scalar, a string, or a list of either."""
        kind = GGUFValueType(self.integer(4))
        if kind != GGUFValueType.ARRAY:
            return self.string() if kind == GGUFValueType.STRING else self.numbers(kind, 1)[0]
        kind, count = GGUFValueType(self.integer(4)), self.integer(8)
        if kind == GGUFValueType.ARRAY:
            raise ValueError("an array of arrays")
        if kind == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        return self.numbers(kind, count)

    def numbers(self, kind: GGUFValueType, count: int) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        numbers: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return numbers


def read_gguf(path: Path) -> GGUFFile:
    """Read the metadata of a GGUF file and map its tensors. Nothing in the file is trusted.

    Raises:
        ValueError: not a GGUF file of version 2 or 3, truncated, or inconsistent.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _parse(_Cursor(np.frombuffer(mapped, np.uint8)))
    except (ValueError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is not a readable GGUF file ({error}): get it again.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check the path.") from error


def _parse(cursor: _Cursor) -> GGUFFile:
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not start with 'GGUF'")
    if (version := cursor.integer(4)) not in (2, 3):
        raise ValueError(f"version {version}, only 2 and 3 little-endian are supported")
    tensor_count, pair_count = cursor.integer(8), cursor.integer(8)
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"the key {key!r} comes twice")
        metadata[key] = cursor.value()
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"alignment {alignment!r}")
    data = cursor.data[-(-cursor.position // alignment) * alignment :]
    tensors = {info[0]: _map_tensor(data, *info) for info in infos}
    if len(tensors) != len(infos):
        raise ValueError("a tensor comes twice")
    return GGUFFile(metadata, tensors)


def _tensor_info(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """Read a tensor's name, type, shape and offset in the data."""
    name, dimensions = cursor.string(), cursor.integer(4)
    if not 1 <= dimensions <= 4:
        raise ValueError(f"{name!r} has {dimensions} dimensions")
    shape = tuple(cursor.integer(8) for _ in range(dimensions))[::-1]
    return name, cursor.integer(4), shape, cursor.integer(8)


def _map_tensor(
    data: npt.NDArray[np.uint8], name: str, number: int, shape: tuple[int, ...], offset: int
) -> GGUFTensor:
    kind = GGMLQuantizationType(number)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block or 0 in shape:
        raise ValueError(f"{name!r} has shape {shape}, not blocks of {block}")
    rows, row_bytes = math.prod(shape[:-1]), shape[-1] // block * block_bytes
    if offset + rows * row_bytes > len(data):
        raise ValueError(f"the file ends before the data of {name!r}")
    bytes_ = data[offset : offset + rows * row_bytes].reshape(rows, row_bytes)
    return GGUFTensor(name, kind, shape, bytes_)


# --- Configuration -----------------------------------------------------------------------------------

_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("llama", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
_PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_QWEN3_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")


def _number(metadata: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Return a positive finite number of the metadata; ValueError if it is missing or anything else."""
    value = metadata.get(key, default)
    if type(value) in (int, float) and 0 < value < math.inf:
        return float(value)
    raise ValueError(f"GGUF metadata {key} is {value!r}, not a positive number: use another file.")


def _count(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a positive integer of the metadata; ValueError if it is missing or anything else."""
    value = metadata.get(key, default)
    if type(value) is int and value > 0:
        return value
    raise ValueError(f"GGUF metadata {key} is {value!r}, not a positive integer: use another file.")


def _config(file: GGUFFile) -> dict[str, Any]:
    """Return the Hugging Face config the metadata and the tensors describe.

    Raises:
        ValueError: an architecture, or a feature of it, that mlx-lm's model would not compute.
    """
    metadata = file.metadata
    arch = metadata.get("general.architecture")
    if arch not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ValueError(f"GGUF architecture {arch!r} is not supported ({known} are): convert the HF repo.")
    model_type, class_name = _ARCHITECTURES[arch]
    heads = _count(metadata, f"{arch}.attention.head_count")
    hidden = _count(metadata, f"{arch}.embedding_length")
    head_dim = _count(metadata, f"{arch}.attention.key_length", hidden // heads)
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if (dim := metadata.get(key, head_dim)) != head_dim:
            raise ValueError(f"GGUF {key} is {dim!r} but heads have {head_dim}: convert the HF repo instead.")
    if "token_embd.weight" not in file.tensors:
        raise ValueError("The GGUF has no tensor token_embd.weight: it is not a whole language model.")
    if model_type == "qwen2" and head_dim * heads != hidden:
        raise ValueError(f"GGUF heads of {head_dim} in a qwen2 of {heads}: mlx-lm has no such model.")
    config = {
        "model_type": model_type,
        "architectures": [class_name],
        "hidden_size": hidden,
        "num_hidden_layers": _count(metadata, f"{arch}.block_count"),
        "intermediate_size": _count(metadata, f"{arch}.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _count(metadata, f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _number(metadata, f"{arch}.attention.layer_norm_rms_epsilon"),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": _count(metadata, f"{arch}.context_length"),
        "rope_theta": _number(metadata, f"{arch}.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": _has_bias(file, model_type, "attn_q", always="qwen2"),
        "mlp_bias": _has_bias(file, model_type, "ffn_gate"),
    }
    if scaling := _rope_scaling(file, arch, config):
        config["rope_scaling"] = scaling
    if window := metadata.get(f"{arch}.attention.sliding_window"):
        print(f"warning: sliding window of {window} ignored, mlx-lm attends to all tokens.", file=sys.stderr)
    return config


def _has_bias(file: GGUFFile, model_type: str, name: str, always: str = "") -> bool:
    """Whether a projection has a bias: a choice in mlx-lm's llama, fixed in its other models."""
    return model_type == always or (model_type == "llama" and f"blk.0.{name}.bias" in file.tensors)


def _vocabulary_size(metadata: Mapping[str, Any]) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and tokens:
        return len(tokens)
    raise ValueError("The GGUF has no list tokenizer.ggml.tokens: use a file with a tokenizer.")


def _rope_scaling(file: GGUFFile, arch: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    metadata, prefix = file.metadata, f"{arch}.rope.scaling"
    if "rope_freqs.weight" in file.tensors:
        return _scaling_of_factors(file, config, _count(metadata, f"{prefix}.original_context_length", 8192))
    old = f"{arch}.rope.scale_linear"
    kind = metadata.get(f"{prefix}.type", "linear" if old in metadata else "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"GGUF rope scaling {kind!r} is not supported: convert the HF repo instead.")
    factor = _number(metadata, old if old in metadata else f"{prefix}.factor")
    scaling = {"type": kind, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = _count(
            metadata, f"{prefix}.original_context_length", config["max_position_embeddings"]
        )
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            scaling[name] = _number(metadata, f"{prefix}.yarn_{name}", default)
    return scaling


def _scaling_of_factors(file: GGUFFile, config: Mapping[str, Any], original: int) -> dict[str, Any]:
    """Return the rope scaling that divides the frequencies by ``rope_freqs.weight`` [head_dim / 2].

    GGUF stores Llama 3's scaling as these factors only. Its parameters are recovered by comparing;
    factors that are not Llama 3's are kept as they are, which mlx-lm calls longrope.
    """
    tensor, half = file.tensors["rope_freqs.weight"], config["head_dim"] // 2
    if tensor.type != GGMLQuantizationType.F32 or tensor.shape != (half,):
        raise ValueError(f"GGUF rope_freqs.weight is {tensor.type.name} {tensor.shape}, not F32 ({half},).")
    factors = tensor.rows.view(np.float32)[0].astype(np.float64)
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    if np.allclose(factors, _llama3_factors(scaling, config), rtol=1e-4):
        return scaling
    return {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "original_max_position_embeddings": config["max_position_embeddings"],  # equal: no magnitude scale
    }


def _llama3_factors(scaling: Mapping[str, Any], config: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """What Llama 3's scaling divides each frequency by [head_dim / 2]: 1, a ramp, then ``factor``."""
    turns = np.arange(0, config["head_dim"], 2) / config["head_dim"]
    wavelengths = 2 * np.pi * config["rope_theta"] ** turns
    smooth = scaling["original_max_position_embeddings"] / wavelengths - scaling["low_freq_factor"]
    smooth = np.clip(smooth / (scaling["high_freq_factor"] - scaling["low_freq_factor"]), 0, 1)
    ramp: npt.NDArray[np.float64] = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return ramp


# --- Weights -----------------------------------------------------------------------------------------

_FLOATS = {GGMLQuantizationType.F32: mx.float32, GGMLQuantizationType.F16: mx.float16}
_FLOATS[GGMLQuantizationType.BF16] = mx.bfloat16
_BITS = {GGMLQuantizationType.Q4_0: 4, GGMLQuantizationType.Q4_1: 4, GGMLQuantizationType.Q8_0: 8}
_SHARD_BYTES = 2 << 30
GROUP = 32


def convert_gguf(path: Path, folder: Path, progress: Callable[[str], None] | None = None) -> None:
    """Convert a GGUF file of the Llama family to a folder that ``mlx_lm.load`` loads.

    Quantized tensors keep their exact values: Q4_0, Q4_1 and Q8_0 become MLX's affine quantization in
    groups of 32. Matrices in F32, F16 and BF16 stay as they are. So that the model computes in one
    dtype, norms and biases (F32 in every GGUF) take that of the matrices: float16 for F16 and
    quantized ones, bfloat16 for BF16, float32 where F32 is among them or the others are mixed.

    Args:
        path: the ``.gguf`` file.
        folder: where it is written to; made if need be.
        progress: called with one line per shard written.

    Raises:
        ValueError: a file that is damaged, or of a type or architecture that is not supported.
    """
    file = read_gguf(path)
    if isinstance(count := file.metadata.get("split.count"), int) and count > 1:
        first = path.with_name(re.sub(r"-\d+-of-", "-00001-of-", path.name))
        raise ValueError(
            f"{path} is one of the {count} parts of a model: join them with llama.cpp's `llama-gguf-split "
            f"--merge {first} joined.gguf`, and give joined.gguf."
        )
    config = _config(file)
    names = _names(file, config)
    dtype = _model_dtype([tensor for tensor in file.tensors.values() if tensor.name in names])
    config["torch_dtype"] = str(dtype).removeprefix("mlx.core.")
    if quantization := _quantization(file, names):
        config["quantization"] = config["quantization_config"] = quantization
    tokens = _vocabulary_size(file.metadata)
    if tokens > config["vocab_size"]:
        raise ValueError(f"{path} has {tokens} tokens, {config['vocab_size']} embeddings: get it again.")
    folder.mkdir(parents=True, exist_ok=True)
    write_gguf_tokenizer(file.metadata, folder, config["max_position_embeddings"], path.name)
    tokenizer = load_tokenizer(folder, eos_token_ids=gguf_ends(file.metadata))
    config["bos_token_id"] = tokenizer.bos_token_id
    config["eos_token_id"] = sorted(tokenizer.eos_token_ids)
    _write_weights(file, names, config, dtype, folder, progress)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")


def _names(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, str]:
    """Map the GGUF name of every tensor to its Hugging Face name, having checked types and shapes."""
    names: dict[str, str] = {}
    for name, hf_name, shape in _expected(file, config):
        tensor = file.tensors.get(name)
        if tensor is None:
            raise ValueError(f"The GGUF lacks the tensor {name}: it is one part of several, or damaged.")
        if tensor.type not in _FLOATS | _BITS:
            raise ValueError(
                f"GGUF tensor {name} has type {tensor.type.name}; supported are F32, F16, BF16, Q4_0, Q4_1"
                " and Q8_0: use such a file (of the same model), or convert the HF repo with --quantize."
            )
        if tensor.shape != shape:
            raise ValueError(f"GGUF tensor {name} has shape {tensor.shape}, not {shape}: use another file.")
        if len(shape) == 1 and tensor.type not in _FLOATS:
            raise ValueError(f"GGUF tensor {name} is a vector of type {tensor.type.name}: use another file.")
        names[name] = hf_name
    unknown = sorted(set(file.tensors) - set(names) - {"rope_freqs.weight"})
    if unknown:
        raise ValueError(
            f"GGUF tensor {unknown[0]} has no place in {config['model_type']}: convert the HF repo."
        )
    return names


def _expected(file: GGUFFile, config: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield the GGUF name, Hugging Face name and shape of every tensor the model is made of."""
    hidden, wide, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    yield "token_embd.weight", "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "output_norm.weight", "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "output.weight", "lm_head.weight", (config["vocab_size"], hidden)
    sizes = dict(zip(_PROJECTIONS, [q, kv, kv, hidden, wide, wide, hidden], strict=True))
    inputs = {"attn_output": q, "ffn_down": wide}
    for layer in range(config["num_hidden_layers"]):
        block, hf_block = f"blk.{layer}", f"model.layers.{layer}"
        for name, hf_name in _NORMS.items():
            yield f"{block}.{name}.weight", f"{hf_block}.{hf_name}.weight", (hidden,)
        if config["model_type"] == "qwen3":
            for name, hf_name in _QWEN3_NORMS.items():
                yield f"{block}.{name}.weight", f"{hf_block}.{hf_name}.weight", (head_dim,)
        for name, hf_name in _PROJECTIONS.items():
            yield (
                f"{block}.{name}.weight",
                f"{hf_block}.{hf_name}.weight",
                (sizes[name], inputs.get(name, hidden)),
            )
            optional = name == "attn_output"  # qwen2 has none; llama's may be absent
            biased = config["attention_bias" if name in _ATTENTION else "mlp_bias"] and not (
                optional and (config["model_type"] == "qwen2" or f"{block}.{name}.bias" not in file.tensors)
            )
            if biased:
                yield f"{block}.{name}.bias", f"{hf_block}.{hf_name}.bias", (sizes[name],)


def _model_dtype(tensors: list[GGUFTensor]) -> mx.Dtype:
    """The dtype activations will have, given the matrices: see ``convert_gguf``."""
    dtypes = {_FLOATS.get(tensor.type, mx.float16) for tensor in tensors if len(tensor.shape) > 1}
    return dtypes.pop() if len(dtypes) == 1 else mx.float32


def _quantization(file: GGUFFile, names: Mapping[str, str]) -> dict[str, Any]:
    """Return mlx-lm's quantization entry: the most frequent bits, and the modules that differ."""
    bits = {hf.removesuffix(".weight"): _BITS.get(file.tensors[name].type) for name, hf in names.items()}
    quantized = {module: width for module, width in bits.items() if width}
    if not quantized:
        return {}
    usual = max(set(quantized.values()), key=list(quantized.values()).count)
    per_module = {
        module: {"group_size": GROUP, "bits": width, "mode": "affine"}
        for module, width in quantized.items()
        if width != usual
    }
    return {"group_size": GROUP, "bits": usual, "mode": "affine", **per_module}


def _write_weights(
    file: GGUFFile,
    names: Mapping[str, str],
    config: Mapping[str, Any],
    dtype: mx.Dtype,
    folder: Path,
    progress: Callable[[str], None] | None,
) -> None:
    """Write the weights in shards of about 2 GiB, the most that is in memory at a time."""
    shards = _shards(file, names)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        target = (
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        )
        arrays: dict[str, mx.array] = {}
        for name in shard:
            arrays |= _arrays(file.tensors[name], names[name], config, dtype)
            if bias := _absent_bias(file, name, config):
                arrays[bias] = mx.zeros(config["hidden_size"], dtype)
        mx.save_safetensors(str(folder / target), arrays, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(arrays, target)
        if progress:
            progress(f"wrote {target}: {len(arrays)} arrays")
    size = sum((folder / target).stat().st_size for target in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")


def _shards(file: GGUFFile, names: Mapping[str, str]) -> list[list[str]]:
    shards: list[list[str]] = []
    room = 0
    for name in names:
        size = file.tensors[name].rows.nbytes
        if not shards or size > room:
            shards.append([])
            room = _SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards


def _arrays(
    tensor: GGUFTensor, hf_name: str, config: Mapping[str, Any], dtype: mx.Dtype
) -> dict[str, mx.array]:
    """Return the MLX arrays of a tensor: itself, or ``weight``, ``scales`` and ``biases``."""
    rows = tensor.rows
    if config["model_type"] == "llama" and ".self_attn." in hf_name:
        rows = _unpermute(tensor, hf_name, config)
    if tensor.type in _BITS:
        weight, scales, biases = unpack_blocks(rows, tensor.type)
        arrays = {"weight": mx.array(weight), "scales": mx.array(scales), "biases": mx.array(biases)}
        arrays = {f"{hf_name.removesuffix('weight')}{part}": array for part, array in arrays.items()}
    else:
        arrays = {hf_name: _floats(rows, tensor, dtype)}
    for name, array in arrays.items():
        if mx.issubdtype(array.dtype, mx.floating) and mx.isnan(array).any():
            raise ValueError(f"GGUF tensor {tensor.name} holds NaN ({name}): get the file again.")
    return arrays


def _absent_bias(file: GGUFFile, name: str, config: Mapping[str, Any]) -> str | None:
    """Name the o_proj bias where mlx-lm's llama wants one beside those of q, k and v and GGUF has none."""
    if not (
        config["model_type"] == "llama" and config["attention_bias"] and name.endswith("attn_output.weight")
    ):
        return None
    bias = name.removesuffix("weight") + "bias"
    return None if bias in file.tensors else f"model.layers.{name.split('.')[1]}.self_attn.o_proj.bias"


def _floats(rows: npt.NDArray[np.uint8], tensor: GGUFTensor, dtype: mx.Dtype) -> mx.array:
    """Return an unquantized tensor; a vector is cast to ``dtype`` unless that overflows."""
    if tensor.type == GGMLQuantizationType.BF16:
        array = mx.array(rows.view(np.uint16)).view(mx.bfloat16)
    else:
        array = mx.array(rows.view(np.float32 if tensor.type == GGMLQuantizationType.F32 else np.float16))
    array = array.reshape(tensor.shape)
    cast = array.astype(dtype)
    return cast if array.ndim == 1 and mx.isfinite(cast).all() else array


def unpack_blocks(
    rows: npt.NDArray[np.uint8], kind: GGMLQuantizationType
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.floating], npt.NDArray[np.floating]]:
    """Turn rows of Q4_0, Q4_1 or Q8_0 blocks into MLX's affine form, value = scale * q + bias.

    Q4_1 stores scale, bias and q; Q4_0 means scale * (q - 8); Q8_0 is signed, so q + 128 is stored.

    Args:
        rows: [N, bytes per row], blocks of 32 values.
        kind: the block type.

    Returns:
        weight: [N, K * bits / 32] uint32, the first value in the lowest bits.
        scales, biases: [N, K / 32] float16, or float32 where the bias does not fit float16.
    """
    count, block_bytes = len(rows), GGML_QUANT_SIZES[kind][1]
    blocks = rows.reshape(count, -1, block_bytes)  # [N, K / 32, bytes]
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    if kind == GGMLQuantizationType.Q8_0:
        packed = blocks[..., 2:] ^ 0x80  # two's complement + 128
        return packed.reshape(count, -1).view(np.uint32), *_scales_and_biases(scales, 128)
    nibbles = blocks[..., -16:]  # value i in the low half of byte i, value i + 16 in the high half
    values = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)  # [N, K / 32, 32]
    packed = values[..., 0::2] | values[..., 1::2] << 4
    weight = packed.reshape(count, -1).view(np.uint32)
    if kind == GGMLQuantizationType.Q4_1:
        return weight, scales, np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0]
    return weight, *_scales_and_biases(scales, 8)


def _scales_and_biases(
    scales: npt.NDArray[np.float16], zero: int
) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
    """Return scales and -zero * scales, both in float32 if the latter overflow float16."""
    with np.errstate(invalid="ignore"):  # a NaN is reported later
        biases = scales.astype(np.float32) * -zero  # exact: zero is a power of two
    if np.abs(biases).max() > np.finfo(np.float16).max:
        return scales.astype(np.float32), biases
    return scales, biases.astype(np.float16)


def _unpermute(tensor: GGUFTensor, hf_name: str, config: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    """Undo GGUF's reordering of the rows of q and k, which interleaves the two halves of each head.

    Row ``2 * i + half`` of a head in the file is row ``half * head_dim / 2 + i`` of the original.
    """
    if ".q_proj." not in hf_name and ".k_proj." not in hf_name:
        return tensor.rows
    rows = tensor.rows if len(tensor.shape) > 1 else tensor.rows.reshape(tensor.shape[0], -1)
    heads = rows.reshape(-1, config["head_dim"] // 2, 2, rows.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(tensor.rows.shape)
