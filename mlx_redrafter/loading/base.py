"""Base models: a folder with a model of mlx-lm's, checked and loaded."""

import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.utils import MODEL_REMAPPING, dequantize_model, load_model

from ..models.bundle import cast
from .read import first_line, read_index, read_object, read_tensors, refuse_pickles

DTYPES = ("float16", "bfloat16", "float32")  # that weights are cast to
# What mlx-lm's code raises on a config.json that is not right.
LOAD_ERRORS = (
    ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError,
    OSError, MemoryError, ImportError,
)  # fmt: skip
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")  # in a config.json


def load_base(
    folder: Path,
    trust_remote_code: bool = False,
    *,
    check_values: bool = True,
    model_config: dict[str, Any] | None = None,
) -> tuple[Module, dict[str, Any]]:
    """Load the model in ``folder`` lazily, having checked every file of it.

    Args:
        check_values: read all weights and refuse NaN; otherwise only headers are read.
        model_config: entries that take the place of those in config.json.

    Returns:
        The mlx-lm model and its config.

    Raises:
        ValueError: a file is missing, damaged or holds NaN; an architecture mlx-lm does not know; or
            Python code in the folder would have to run and ``trust_remote_code`` is False.
    """
    raw = _check_config(folder, trust_remote_code)
    _check_layers(folder, raw, _check_weights(folder, check_values))
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if "trust_remote_code" not in inspect.signature(load_model).parameters:
        trust = {}  # mlx-lm before 0.32
    try:
        model, config = load_model(folder, lazy=True, model_config=model_config, **trust)
    except LOAD_ERRORS as error:
        raise ValueError(
            f"mlx-lm cannot load {folder} ({first_line(error)}): check its config.json."
        ) from error
    return model, config


def check_weight_format(source: str, files: list[str]) -> None:
    """Refuse a model without safetensors, naming the pickle or GGUF file it has instead."""
    if any(name.endswith(".safetensors") for name in files):
        return
    refuse_pickles(Path(source) / name for name in files)
    if ggufs := sorted(name for name in files if name.endswith(".gguf")):
        raise ValueError(f"{source} holds GGUF files: download one, such as {ggufs[0]}, and give its path.")
    raise ValueError(f"{source} holds no model*.safetensors: download the weights too.")


def _check_config(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    config = read_object(folder / "config.json")
    name, own_code = str(config.get("model_type")), config.get("model_file")
    if own_code and not trust_remote_code:
        raise ValueError(f"{folder} needs its own code, {own_code!r}: --trust-remote-code runs it.")
    if not (own_code or has_module(name)):
        raise ValueError(f"mlx-lm has no model_type {name!r} ({folder}): update mlx-lm or use another model.")
    return config


def has_module(model_type: str) -> bool:
    """Whether mlx-lm has code for models of this type."""
    name = MODEL_REMAPPING.get(model_type, model_type)
    return (
        bool(re.fullmatch(r"[\w-]+", name)) and importlib.util.find_spec(f"mlx_lm.models.{name}") is not None
    )


def _check_layers(folder: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse more layers than there are tensors before mlx-lm builds them (their arrays it builds lazily)."""
    nested = config.get("text_config")
    for section in (config, nested if isinstance(nested, dict) else {}):
        for key in _LAYER_COUNTS:
            if isinstance(count := section.get(key), int) and count > tensors:
                raise ValueError(
                    f"{folder}: config.json asks for {key} {count}, but the weights are {tensors} tensors: "
                    "get the model again."
                )


def _check_weights(folder: Path, check_values: bool) -> int:
    """Check that every shard is there and whole; return the number of tensors.

    With ``check_values`` refuse NaN too, one array in memory at a time.
    """
    shards, listed = find_shards(folder)
    owners: dict[str, str] = {}
    for shard in shards:
        weights = read_tensors(shard)
        if twice := sorted(weights.keys() & owners.keys()):
            files = [owners[twice[0]], shard.name]
            stray = [name for name in files if listed and name not in listed] or files
            raise ValueError(
                f"{folder} has {twice[0]} in {files[0]} and {files[1]}: move {' or '.join(stray)} elsewhere."
            )
        owners |= dict.fromkeys(weights, shard.name)
        while check_values and weights:
            name, array = weights.popitem()
            if mx.issubdtype(array.dtype, mx.floating) and mx.isnan(array).any():
                raise ValueError(f"{name} in {shard} holds NaN: get the model again or use another one.")
    return len(owners)


def find_shards(folder: Path) -> tuple[list[Path], set[str]]:
    """The files of weights in a folder, and their names by its index; ``ValueError`` if one is missing."""
    shards = sorted(folder.glob("model*.safetensors"))
    listed = _listed(folder, shards)
    if missing := sorted(listed - {shard.name for shard in shards}):
        raise ValueError(
            f"{folder} lacks {missing[0]}, by its index or the names of its other files: get that file too."
        )
    if not shards:
        check_weight_format(str(folder), [file.name for file in folder.iterdir()])
        raise ValueError(f"{folder} holds no model*.safetensors: get the weights, or give them that name.")
    return shards, listed


def _listed(folder: Path, shards: list[Path]) -> set[str]:
    """The names of all files of weights, by the index, else by names as model-00001-of-00002."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return read_index(index)
    names = [re.fullmatch(r"(.+-)\d{5}-of-(\d{5})(\..+)", shard.name) for shard in shards]
    return {f"{m[1]}{number:05d}-of-{m[2]}{m[3]}" for m in names if m for number in range(1, int(m[2]) + 1)}


def as_floats(model: Module, dtype: str | None) -> None:
    """Give a model's float parameters this type, and dequantize the others; None or "stored" do nothing."""
    if dtype not in (None, "stored"):
        cast_model(model, dtype)
        dequantize_model(model)


def cast_model(model: Module, dtype: Any) -> None:
    """Give the float parameters that the model allows to be cast this type; unless it is none of three."""
    if dtype in DTYPES:
        allowed = getattr(model, "cast_predicate", lambda _: True)
        model.update(cast(model.parameters(), getattr(mx, dtype), allowed))
