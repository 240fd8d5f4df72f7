"""GGUF files, converted to folders that mlx-lm loads: exactly where MLX has the form, else the nearest."""

import dataclasses
import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Type
from mlx.utils import tree_flatten
from tqdm import tqdm

from ..build_tokenizers import gguf_ends, write_gguf_tokenizer
from ..tokenizer import load_tokenizer
from .architectures import Architecture, Config, architecture_of, config_of
from .quants import FLOATS, SUPPORTED, error_of, floats, is_exact, quantization_of, quantized
from .reader import GGUFFile, GGUFTensor, read_gguf

__all__ = ["QUANTS", "convert_gguf", "read_gguf"]

QUANTS = ("nearest", "keep", "float")
_FACTORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}  # in the config
_DTYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.uint8: "U8"}
Tensors = dict[str, GGUFTensor]  # by mlx-lm's names


def convert_gguf(
    path: Path, folder: Path, progress: Callable[[str], None] | None = None, *, quant: str = "nearest"
) -> None:
    """Convert a GGUF file, or a split one of which this is a part, to a folder that ``mlx_lm.load`` loads.

    Of quantized tensors Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL and MXFP4 keep their exact values in MLX's
    groups of 32. Q4_K, Q5_K and IQ4_XS do with scales in float32; otherwise these are rounded. Q6_K,
    Q3_K and Q2_K have groups of 16, which MLX has not: "nearest" fits groups of 32. Matrices in F32, F16
    and BF16 stay as they are. So that the model computes in one dtype, scales, norms and biases (F32 in
    every GGUF) take that of these matrices, float32 where they are of several; without such matrices it
    is float16, or bfloat16 for architectures whose activations overflow float16.

    Args:
        path: the ``.gguf`` file.
        folder: where it is written to; made if need be.
        progress: called with one line at the end. A terminal shows a bar besides.
        quant: "nearest" is as small as MLX can; its error is measured and told. "keep" is exact: scales in
            float32, and matrices in float32 where MLX has no exact form. "float" dequantizes to float32.

    Raises:
        ValueError: a file that is damaged, or of a type or architecture that is not supported.
    """
    if quant not in QUANTS:
        raise ValueError(f"--gguf-quant is {quant!r}: choose one of {', '.join(QUANTS)}.")
    file = read_gguf(path)
    architecture = architecture_of(file)
    config = config_of(file, architecture)
    tensors, linear = _tensors(file, architecture, config)
    dtype = _dtype(tensors, linear, architecture, quant)
    config["torch_dtype"] = str(dtype).removeprefix("mlx.core.")
    quantizations = {name: quantization_of(tensors[f"{name}.weight"].type, quant) for name in linear}
    if entries := {name: entry for name, entry in quantizations.items() if entry}:
        config["quantization"] = config["quantization_config"] = _quantization(entries)
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
    total = sum(tensor.rows.nbytes for tensor in tensors.values())
    silent = sys.stderr is None or not sys.stderr.isatty()
    with tqdm(total=total, desc="converting", unit="B", unit_scale=True, leave=False, disable=silent) as bar:

        def arrays() -> Iterator[tuple[str, mx.array]]:
            for name, tensor in tensors.items():
                module = name.removesuffix(".weight")
                small = module not in linear or _is_router(tensor)
                yield from _arrays(tensor, name, entries.get(module), architecture, config, small).items()
                bar.update(tensor.rows.nbytes)

        count = _write_safetensors(folder / "model.safetensors", arrays(), 3 * len(tensors))
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")
    _tell_errors([tensors[f"{name}.weight"] for name in entries], dtype)
    if progress:
        progress(f"wrote model.safetensors: {count} arrays")


# --- Tensors -----------------------------------------------------------------------------------------


def _tensors(file: GGUFFile, architecture: Architecture, config: Config) -> tuple[Tensors, list[str]]:
    """Return all tensors by mlx-lm's names, having checked types and shapes, and the modules with matrices.

    What must be there, and its shapes, is asked of mlx-lm's model, built of arrays that are never computed.
    """
    first = next(iter(architecture.layer))
    for layer in range(config["num_hidden_layers"]):  # before a model of a billion layers is built
        if not any(f"blk.{layer}.{name}.weight" in file.tensors for name in architecture.layer):
            raise ValueError(f"The GGUF lacks the tensor blk.{layer}.{first}.weight: get the file again.")
    tensors: Tensors = {}
    for name, found in _renamed(file, architecture, config):
        tensors[name] = _stacked(tensors[name], found) if name in tensors else found
    shapes, linear = _wanted(config, tensors)
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None and name.endswith("o_proj.bias"):  # mlx-lm wants it beside those of q, k and v
            zeros = np.zeros((1, 4 * shape[0]), np.uint8)
            tensor = tensors[name] = GGUFTensor(name, Type.F32, shape, zeros)
        if tensor is None:
            missing = _gguf_name(name, architecture)
            raise ValueError(f"The GGUF lacks the tensor {missing}: get the file again.")
        _check_tensor(tensor, shape, name in linear)
        tensors[name] = dataclasses.replace(tensor, shape=shape)
    if unknown := sorted(tensors[name].name for name in tensors.keys() - shapes.keys()):
        raise ValueError(
            f"GGUF tensor {unknown[0]} has no place in {config['model_type']}: convert the HF repo."
        )
    return tensors, [name.removesuffix(".weight") for name in linear]


def _check_tensor(tensor: GGUFTensor, shape: tuple[int, ...], linear: bool) -> None:
    name = tensor.name
    if tensor.type not in SUPPORTED:
        known = ", ".join(kind.name for kind in SUPPORTED)
        raise ValueError(
            f"GGUF tensor {name} has type {tensor.type.name}; supported are {known}: use such a file (of the"
            " same model), or convert the HF repo with --quantize."
        )
    if [size for size in tensor.shape if size != 1] != [size for size in shape if size != 1]:
        raise ValueError(f"GGUF tensor {name} has shape {tensor.shape}, not {shape}: use another file.")
    if not linear and tensor.type not in FLOATS:
        raise ValueError(f"GGUF tensor {name} is a vector of type {tensor.type.name}: use another file.")


def _renamed(file: GGUFFile, architecture: Architecture, config: Config) -> Iterator[tuple[str, GGUFTensor]]:
    further = f"{file.metadata['general.architecture']}.nextn_predict_layers" in file.metadata
    for name, tensor in file.tensors.items():
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(.*?)(\.weight|\.bias|)", name, re.DOTALL)
        assert match  # anything does
        layer, base, suffix = match.groups()
        names = architecture.top if layer is None else architecture.layer
        prefix = "" if layer is None else f"{architecture.root}.layers.{layer}."
        if further and layer is not None and int(layer) >= config["num_hidden_layers"]:
            continue  # it predicts more than the next token, which mlx-lm's models do not
        if base == "ssm_conv1d" and suffix == ".weight":
            tensor = dataclasses.replace(tensor, shape=(*tensor.shape, 1))
        elif base == "ssm_norm":  # of groups
            tensor = dataclasses.replace(tensor, shape=(math.prod(tensor.shape),))
        if base == "ssm_ba" and suffix:
            yield from _split_gates(tensor, f"{prefix}linear_attn.in_proj_%s{suffix}", config)
        elif f"{base}{suffix}" in names:
            yield prefix + names[f"{base}{suffix}"], tensor
        elif base in names and suffix:
            yield f"{prefix}{names[base]}{suffix}", tensor
        elif base == "attn_qkv" and suffix:
            yield from _split_qkv(file, tensor, f"{prefix}self_attn.%s_proj{suffix}")
        elif name not in _FACTORS:
            yield f"GGUF's {name}", tensor  # which no model has


def _split_qkv(file: GGUFFile, tensor: GGUFTensor, name: str) -> Iterator[tuple[str, GGUFTensor]]:
    """Cut a fused projection into those of q, k and v, by the numbers of heads."""
    arch = file.metadata["general.architecture"]
    heads = file.metadata[f"{arch}.attention.head_count"]
    kv_heads = file.metadata.get(f"{arch}.attention.head_count_kv", heads)
    rows = tensor.rows if len(tensor.shape) > 1 else tensor.rows.reshape(tensor.shape[0], -1)
    head_dim = len(rows) // (heads + 2 * kv_heads)
    parts = np.split(rows, [heads * head_dim, (heads + kv_heads) * head_dim])
    for part, which in zip(parts, "qkv", strict=True):
        yield name % which, dataclasses.replace(tensor, shape=(len(part), *tensor.shape[1:]), rows=part)


def _split_gates(tensor: GGUFTensor, name: str, config: Config) -> Iterator[tuple[str, GGUFTensor]]:
    """Cut the projection of both gates of a gated delta net, which are stored by turns, by key heads."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    if len(tensor.shape) != 2 or tensor.shape[0] != 2 * values:
        raise ValueError(
            f"GGUF tensor {tensor.name} has shape {tensor.shape}, not {2 * values} rows: use another file."
        )
    for rows, which in zip(
        np.split(tensor.rows.reshape(keys, 2 * values // keys, -1), 2, 1), "ba", strict=True
    ):
        part = np.ascontiguousarray(rows).reshape(values, -1)
        yield name % which, dataclasses.replace(tensor, shape=(values, tensor.shape[1]), rows=part)


def _stacked(*parts: GGUFTensor) -> GGUFTensor:
    """Two projections as mlx-lm's one, in the order of GGUF's names: gate and up."""
    first, second = sorted(parts, key=lambda tensor: tensor.name)
    if (first.type, first.shape[1:]) != (second.type, second.shape[1:]) or len(first.shape) < 2:
        raise ValueError(
            f"GGUF tensors {first.name} ({first.type.name} {first.shape}) and {second.name} "
            f"({second.type.name} {second.shape}) do not go together: convert the HF repo."
        )
    rows = np.concatenate([first.rows, second.rows])
    shape = (first.shape[0] + second.shape[0], *first.shape[1:])
    return dataclasses.replace(first, shape=shape, rows=rows)


def _gguf_name(name: str, architecture: Architecture) -> str:
    """GGUF's name of a tensor that mlx-lm's model has."""
    layers = f"{architecture.root}.layers."
    layer, _, rest = name.removeprefix(layers).partition(".")
    if name.startswith(layers):
        names, prefix = architecture.layer, f"blk.{layer}."
    else:
        names, prefix, rest = architecture.top, "", name
    module, _, suffix = rest.rpartition(".")
    for gguf, own in names.items():
        if own in (rest, module):
            return f"{prefix}{gguf}" if own == rest else f"{prefix}{gguf}.{suffix}"
    return name


def _wanted(config: Config, tensors: Tensors) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return the shapes of the parameters of mlx-lm's model, and which are matrices that it may quantize."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    try:
        model = module.Model(module.ModelArgs.from_dict(config))
        if hasattr(model, "sanitize"):  # it may drop the head that is the embedding's
            model.sanitize({name: mx.zeros(tensor.shape) for name, tensor in tensors.items()})
        parameters: Any = tree_flatten(model.parameters())
        shapes = {name: array.shape for name, array in parameters}
    except Exception as error:  # a config is a program's input: mlx-lm checks nothing
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"mlx-lm cannot build this GGUF's model ({reason}): use another file.") from error
    linear = {f"{name}.weight" for name, part in model.named_modules() if hasattr(part, "to_quantized")}
    return shapes, linear & shapes.keys()


# --- Weights -----------------------------------------------------------------------------------------


def _dtype(tensors: Tensors, linear: list[str], architecture: Architecture, quant: str) -> mx.Dtype:
    """Return what the model computes in: the dtype of its matrices but for the small ones of routers."""
    kinds = {tensors[f"{name}.weight"].type for name in linear if not _is_router(tensors[f"{name}.weight"])}
    blocks = kinds - set(FLOATS)
    if blocks and (quant == "float" or (quant == "keep" and not all(map(is_exact, blocks)))):
        return mx.float32
    dtypes = {FLOATS[kind] for kind in kinds if kind in FLOATS}
    if quant == "keep" and dtypes and blocks - {Type.MXFP4}:
        dtypes.add(mx.float16)  # in which the scales are exact
    return dtypes.pop() if len(dtypes) == 1 else mx.float32 if dtypes else architecture.dtype


def _is_router(tensor: GGUFTensor) -> bool:
    """Whether it is one of the small matrices, which are often left in float32."""
    return bool(re.search(r"ffn_gate_inp|ssm_(alpha|beta|ba)\b", tensor.name))


def _quantization(entries: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return mlx-lm's quantization entry: the most frequent form, and the modules that differ."""
    forms = list(entries.values())
    usual = max(forms, key=forms.count)
    return usual | {name: entry for name, entry in entries.items() if entry != usual}


def _arrays(
    tensor: GGUFTensor,
    name: str,
    entry: Mapping[str, Any] | None,
    architecture: Architecture,
    config: Config,
    small: bool,
) -> dict[str, mx.array]:
    """Return the MLX arrays of a tensor: ``weight``, ``scales`` and ``biases``, or itself.

    What is ``small``, a vector or a router, is cast to the model's dtype unless that overflows.
    """
    rows, dtype = tensor.rows, getattr(mx, config["torch_dtype"])
    if architecture.interleaved and re.search(r"\.[qk]_proj\.", name):
        rows = _unpermute(tensor, config["head_dim"])
    if entry:
        parts = quantized(rows, tensor.type, dtype)
        arrays = {
            f"{name.removesuffix('weight')}{part}": array.reshape(*tensor.shape[:-1], -1)
            for part, array in parts.items()
        }
    else:
        array = floats(rows, tensor.type).reshape(tensor.shape)
        if architecture.plus_one and name.endswith("norm.weight"):
            array = array - 1
        if name.endswith(".A_log"):
            array, small = mx.log(-array), array.ndim > 1  # one of heads stays precise, as in mlx-lm
        cast = array.astype(dtype)
        arrays = {name: cast if small and mx.isfinite(cast).all() else array}
    if architecture.tiled and (match := re.search(r"\.linear_attn\.(?!norm)(\w+)", name)):
        arrays = {part: _grouped(array, match[1], config) for part, array in arrays.items()}
    for part, array in arrays.items():
        exponents = array.dtype == mx.uint8  # of MXFP4, where 255 is NaN
        if mx.any(array == 255 if exponents else mx.isnan(array)):
            raise ValueError(f"GGUF tensor {tensor.name} holds NaN ({part}): get the file again.")
    return arrays


def _unpermute(tensor: GGUFTensor, head_dim: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Undo GGUF's reordering of the rows of q and k, which interleaves the two halves of each head.

    Row ``2 * i + half`` of a head in the file is row ``half * head_dim / 2 + i`` of the original.
    """
    rows = tensor.rows if len(tensor.shape) > 1 else tensor.rows.reshape(tensor.shape[0], -1)
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(tensor.rows.shape)


def _grouped(array: mx.array, module: str, config: Config) -> mx.array:
    """Order the value heads of a gated delta net by their key heads, G each, as mlx-lm does.

    Head ``i * keys + key`` in the file is head ``key * G + i`` of the original. Heads are blocks of rows (the
    last ones where q and k come first), and of columns of the projection that reads them.
    """
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    if module == "out_proj":
        heads = array.reshape(*array.shape[:-1], values // keys, keys, -1)
        return heads.swapaxes(-3, -2).reshape(array.shape)
    before = 2 * keys * config["linear_key_head_dim"] if module in ("in_proj_qkv", "conv1d") else 0
    heads = array[before:].reshape(values // keys, keys, -1, *array.shape[1:]).swapaxes(0, 1)
    return mx.concatenate([array[:before], heads.reshape(-1, *array.shape[1:])])


def _write_safetensors(path: Path, arrays: Iterator[tuple[str, mx.array]], count: int) -> int:
    """Write arrays as they come, so that one is in memory at a time; return their number.

    The header comes first in the file and is written last, into room for ``count`` entries; spaces fill it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    room, position = 1024 + 512 * count, 0
    with path.open("wb") as file:
        file.seek(8 + room)
        for name, array in arrays:
            file.write(np.asarray(mx.contiguous(array).reshape(-1).view(mx.uint8)).data)  # not a copy
            offsets = [position, position + array.nbytes]
            header[name] = {"dtype": _DTYPES[array.dtype], "shape": array.shape, "data_offsets": offsets}
            position = offsets[1]
            mx.clear_cache()  # or it would keep the memory of every tensor
        file.seek(0)
        file.write(room.to_bytes(8, "little") + json.dumps(header).encode().ljust(room))
    return len(header) - 1


def _tell_errors(tensors: list[GGUFTensor], dtype: mx.Dtype) -> None:
    """Say by how much the values of each type differ from those in the file."""
    sums: dict[str, list[float]] = {}
    for tensor in tensors:
        if not is_exact(tensor.type) or (dtype == mx.bfloat16 and tensor.type != Type.MXFP4):
            total = sums.setdefault(tensor.type.name, [0.0, 0.0])
            total[:] = map(sum, zip(total, error_of(tensor.rows, tensor.type, dtype), strict=True))
    told = ", ".join(f"{name} {(error / (total or 1)) ** 0.5:.2%}" for name, (error, total) in sums.items())
    if told and dtype != mx.float32:
        print(f"note: weights in MLX's nearest form, with an error of {told}.", file=sys.stderr)
