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
from mlx_lm.models.rope_utils import Llama3RoPE
from mlx_lm.utils import make_shards

from .tokenizers import gguf_ends, load_tokenizer, write_gguf_tokenizer

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
    end = offset + rows * row_bytes
    if end > len(data):
        raise ValueError(f"the file ends before the data of {name!r}")
    return GGUFTensor(name, kind, shape, data[offset:end].reshape(rows, row_bytes))


# --- Configuration -----------------------------------------------------------------------------------

_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


def _positive(kind: type, metadata: Mapping[str, Any], key: str, default: float | None = None) -> Any:
    """Return a positive finite number of the metadata as ``kind``; ValueError if it is missing or not one."""
    value = metadata.get(key, default)
    if type(value) in (int, kind) and 0 < value < math.inf:
        return kind(value)
    wanted = "integer" if kind is int else "number"
    raise ValueError(f"GGUF metadata {key} is {value!r}, not a positive {wanted}: use another file.")


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
    model_type = "llama" if arch == "mistral" else arch
    heads = _positive(int, metadata, f"{arch}.attention.head_count")
    hidden = _positive(int, metadata, f"{arch}.embedding_length")
    head_dim = _positive(int, metadata, f"{arch}.attention.key_length", hidden // heads)
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if (dim := metadata.get(key, head_dim)) != head_dim:
            raise ValueError(f"GGUF {key} is {dim!r} but heads have {head_dim}: convert the HF repo instead.")
    if "token_embd.weight" not in file.tensors:
        raise ValueError("The GGUF has no tensor token_embd.weight: it is not a whole language model.")
    if model_type == "qwen2" and head_dim * heads != hidden:
        raise ValueError(f"GGUF heads of {head_dim} in a qwen2 of {heads}: mlx-lm has no such model.")
    llama = model_type == "llama"  # biases are a choice there, fixed in mlx-lm's other models
    config = {
        "model_type": model_type,
        "architectures": [f"{arch.capitalize()}ForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": _positive(int, metadata, f"{arch}.block_count"),
        "intermediate_size": _positive(int, metadata, f"{arch}.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _positive(int, metadata, f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _positive(float, metadata, f"{arch}.attention.layer_norm_rms_epsilon"),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": _positive(int, metadata, f"{arch}.context_length"),
        "rope_theta": _positive(float, metadata, f"{arch}.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": model_type == "qwen2" or (llama and "blk.0.attn_q.bias" in file.tensors),
        "mlp_bias": llama and "blk.0.ffn_gate.bias" in file.tensors,
    }
    if scaling := _rope_scaling(file, arch, config):
        config["rope_scaling"] = scaling
    if window := metadata.get(f"{arch}.attention.sliding_window"):
        print(f"warning: sliding window of {window} ignored, mlx-lm attends to all tokens.", file=sys.stderr)
    return config


def _rope_scaling(file: GGUFFile, arch: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    metadata, prefix = file.metadata, f"{arch}.rope.scaling"
    original, context = f"{prefix}.original_context_length", config["max_position_embeddings"]
    if "rope_freqs.weight" in file.tensors:
        return _scaling_of_factors(file, config, _positive(int, metadata, original, 8192))
    old = f"{arch}.rope.scale_linear"
    kind = metadata.get(f"{prefix}.type", "linear" if old in metadata else "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"GGUF rope scaling {kind!r} is not supported: convert the HF repo instead.")
    factor = _positive(float, metadata, old if old in metadata else f"{prefix}.factor")
    scaling = {"type": kind, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = _positive(int, metadata, original, context)
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            scaling[name] = _positive(float, metadata, f"{prefix}.yarn_{name}", default)
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


# --- Weights -----------------------------------------------------------------------------------------

_FLOATS = {GGMLQuantizationType.F32: mx.float32, GGMLQuantizationType.F16: mx.float16}
_FLOATS[GGMLQuantizationType.BF16] = mx.bfloat16
_BITS = {GGMLQuantizationType.Q4_0: 4, GGMLQuantizationType.Q4_1: 4, GGMLQuantizationType.Q8_0: 8}
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
    tensors = _tensors(file, config)
    dtypes = {_FLOATS.get(tensor.type, mx.float16) for tensor in tensors.values() if len(tensor.shape) > 1}
    dtype = dtypes.pop() if len(dtypes) == 1 else mx.float32
    config["torch_dtype"] = str(dtype).removeprefix("mlx.core.")
    if quantization := _quantization(tensors):
        config["quantization"] = config["quantization_config"] = quantization
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ValueError("The GGUF has no list tokenizer.ggml.tokens: use a file with a tokenizer.")
    if len(tokens) > config["vocab_size"]:
        raise ValueError(f"{path} has {len(tokens)} tokens, {config['vocab_size']} embeddings: get it again.")
    folder.mkdir(parents=True, exist_ok=True)
    write_gguf_tokenizer(file.metadata, folder, config["max_position_embeddings"], path.name)
    tokenizer = load_tokenizer(folder, eos_token_ids=gguf_ends(file.metadata))
    config["bos_token_id"] = tokenizer.bos_token_id
    config["eos_token_id"] = sorted(tokenizer.eos_token_ids)
    _write_weights(tensors, config, folder, progress or (lambda _: None))
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")


def _tensors(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, GGUFTensor]:
    """Return all tensors by their Hugging Face names, having checked types and shapes."""
    tensors: dict[str, GGUFTensor] = {}
    for name, hf_name, shape in _expected(config):
        tensor = file.tensors.get(name)
        if tensor is None and name.endswith("attn_output.bias"):  # mlx-lm's llama wants it beside the others
            tensor = GGUFTensor(name, GGMLQuantizationType.F32, shape, np.zeros((1, 4 * shape[0]), np.uint8))
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
        tensors[hf_name] = tensor
    unknown = sorted(set(file.tensors) - {tensor.name for tensor in tensors.values()} - {"rope_freqs.weight"})
    if unknown:
        raise ValueError(
            f"GGUF tensor {unknown[0]} has no place in {config['model_type']}: convert the HF repo."
        )
    return tensors


def _expected(config: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield the GGUF name, Hugging Face name and shape of every tensor the model is made of."""
    hidden, wide, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    yield "token_embd.weight", "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "output_norm.weight", "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "output.weight", "lm_head.weight", (config["vocab_size"], hidden)
    bias, mlp_bias = config["attention_bias"], config["mlp_bias"]
    parts = [  # GGUF's name, Hugging Face's, shape, whether there is a bias
        ("attn_norm", "input_layernorm", (hidden,), False),
        ("ffn_norm", "post_attention_layernorm", (hidden,), False),
        ("attn_q", "self_attn.q_proj", (q, hidden), bias),
        ("attn_k", "self_attn.k_proj", (kv, hidden), bias),
        ("attn_v", "self_attn.v_proj", (kv, hidden), bias),
        ("attn_output", "self_attn.o_proj", (hidden, q), bias and config["model_type"] == "llama"),
        ("ffn_gate", "mlp.gate_proj", (wide, hidden), mlp_bias),
        ("ffn_up", "mlp.up_proj", (wide, hidden), mlp_bias),
        ("ffn_down", "mlp.down_proj", (hidden, wide), mlp_bias),
    ]
    if config["model_type"] == "qwen3":
        parts[2:2] = [(f"attn_{x}_norm", f"self_attn.{x}_norm", (head_dim,), False) for x in "qk"]
    for layer in range(config["num_hidden_layers"]):
        for name, hf_name, shape, biased in parts:
            yield f"blk.{layer}.{name}.weight", f"model.layers.{layer}.{hf_name}.weight", shape
            if biased:
                yield f"blk.{layer}.{name}.bias", f"model.layers.{layer}.{hf_name}.bias", shape[:1]


def _quantization(tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    """Return mlx-lm's quantization entry: the most frequent bits, and the modules that differ."""
    bits = {name.removesuffix(".weight"): _BITS.get(tensor.type) for name, tensor in tensors.items()}
    widths = [width for width in bits.values() if width]
    if not widths:
        return {}
    usual = max(set(widths), key=widths.count)
    options = {width: {"group_size": GROUP, "bits": width, "mode": "affine"} for width in widths}
    return options[usual] | {m: options[width] for m, width in bits.items() if width and width != usual}


def _write_weights(
    tensors: dict[str, GGUFTensor], config: dict[str, Any], folder: Path, say: Callable[[str], None]
) -> None:
    """Write the weights in shards of about 2 GiB, the most that is in memory at a time."""
    shards = make_shards({name: tensor.rows for name, tensor in tensors.items()}, 2)
    shards = [shard for shard in shards if shard]  # older mlx-lm puts an empty one before a larger tensor
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        number_of = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        target = f"model{number_of}.safetensors"
        arrays: dict[str, mx.array] = {}
        for name in shard:
            arrays |= _arrays(tensors[name], name, config)
        mx.save_safetensors(str(folder / target), arrays, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(arrays, target)
        say(f"wrote {target}: {len(arrays)} arrays")
    size = sum((folder / target).stat().st_size for target in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")


def _arrays(tensor: GGUFTensor, hf_name: str, config: Mapping[str, Any]) -> dict[str, mx.array]:
    """Return the MLX arrays of a tensor: ``weight``, ``scales`` and ``biases``, or itself.

    A vector is cast to the model's dtype unless that overflows.
    """
    rows = tensor.rows
    if config["model_type"] == "llama" and re.search(r"\.[qk]_proj\.", hf_name):
        rows = _unpermute(tensor, config["head_dim"])
    if tensor.type in _BITS:
        parts = zip(("weight", "scales", "biases"), unpack_blocks(rows, tensor.type), strict=True)
        arrays = {hf_name.removesuffix("weight") + part: mx.array(values) for part, values in parts}
    else:
        array = mx.array(rows).view(_FLOATS[tensor.type]).reshape(tensor.shape)
        cast = array.astype(getattr(mx, config["torch_dtype"]))
        arrays = {hf_name: cast if array.ndim == 1 and mx.isfinite(cast).all() else array}
    for name, array in arrays.items():
        if mx.issubdtype(array.dtype, mx.floating) and mx.isnan(array).any():
            raise ValueError(f"GGUF tensor {tensor.name} holds NaN ({name}): get the file again.")
    return arrays


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
    blocks = rows.reshape(len(rows), -1, GGML_QUANT_SIZES[kind][1])  # [N, K / 32, bytes]
    scales = blocks[..., :2].copy().view(np.float16)[..., 0]
    if kind == GGMLQuantizationType.Q8_0:
        packed, zero = blocks[..., 2:] ^ 0x80, 128  # two's complement + 128
    else:
        nibbles = blocks[..., -16:]  # value i in the low half of byte i, value i + 16 in the high half
        values = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)  # [N, K / 32, 32]
        packed, zero = values[..., 0::2] | values[..., 1::2] << 4, 8
    weight = packed.reshape(len(rows), -1).view(np.uint32)
    if kind == GGMLQuantizationType.Q4_1:
        return weight, scales, blocks[..., 2:4].copy().view(np.float16)[..., 0]
    with np.errstate(invalid="ignore"):  # a NaN is reported later
        biases = scales.astype(np.float32) * -zero  # exact: zero is a power of two
    if np.abs(biases).max() > np.finfo(np.float16).max:
        return weight, scales.astype(np.float32), biases
    return weight, scales, biases.astype(np.float16)


def _unpermute(tensor: GGUFTensor, head_dim: int) -> npt.NDArray[np.uint8]:
    """Undo GGUF's reordering of the rows of q and k, which interleaves the two halves of each head.

    Row ``2 * i + half`` of a head in the file is row ``half * head_dim / 2 + i`` of the original.
    """
    rows = tensor.rows if len(tensor.shape) > 1 else tensor.rows.reshape(tensor.shape[0], -1)
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(tensor.rows.shape)
