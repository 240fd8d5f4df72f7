"""The drafter on disk: a folder with ``config.json`` and ``model.safetensors``.

Tensor names are Apple's. A bundle that this package wrote has an ``mlx_redrafter`` section in its
config.json: which base model it belongs to, which tensors nothing reads, and whether linear layers are
``stored`` in fewer bits than they have in memory. A folder without that section is a checkpoint in Apple's
layout and loads too, in one file or sharded, under each of the names in use. Every value is checked on the
way in; weights are only ever read from safetensors.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map_with_path

from ..loading.read import check_finite, dtype_name, read_index, read_object, read_tensors, refuse_pickles
from .drafter import Drafter, DrafterConfig, Quantization
from .identity import BaseIdentity

MODEL_TYPE = "recurrent_drafting_drafter"
SECTION = "mlx_redrafter"  # of config.json
FORMAT = 1
FROM_PICKLE = (
    "save the drafter as safetensors where it was trained "
    "(safetensors.torch.save_file(drafter.state_dict(), 'model.safetensors'))."
)
UNUSED = ("emb_norm.weight",)  # in Apple's checkpoints; nothing reads it
ALIASES = {r"^lm_heads\.": "lm_head.", r"^0\.": "lm_head.", r"^input_projs\.": "input_proj."}


def load_drafter(folder: Path, target: BaseIdentity | None = None, dtype: mx.Dtype | None = None) -> Drafter:
    """Load a drafter for a base model.

    Args:
        folder: of the drafter, as ``drafter_folder`` finds it.
        target: the base model; None skips the comparison.
        dtype: of every float tensor in memory, the scales of quantized layers included; None keeps
            what is on disk. A drafter whose dtype is not the base model's slows it or breaks it.
    Raises:
        ValueError: the drafter is damaged, or belongs to another base model.
    """
    raw = read_config(folder)
    config = parse_config(folder, raw)
    if target is not None:
        check_base(folder, config, base_of(raw), target)
    weights, extra = read_weights(folder, config, raw, dtype)
    unused = {*UNUSED, *raw.get(SECTION, {}).get("unused_tensors", [])}
    if unknown := sorted(set(extra) - unused):
        names = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise ValueError(f"{folder} holds tensors that no drafter of its config.json has: {names}.")
    weights = cast({name: weights[name] for name in config.shapes()}, dtype)
    check_values(folder, config, weights)
    drafter = Drafter(config, weights.pop("draft_to_target", None))
    drafter.load_weights(list(weights.items()))
    return drafter


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a drafter; ``ValueError`` if it is missing, damaged or not a drafter's."""
    path = folder / "config.json"
    raw = read_object(path)
    if (found := raw.get("model_type")) != MODEL_TYPE:
        raise ValueError(
            f"{path} has model_type {found!r}, not {MODEL_TYPE!r}: name the folder of a drafter."
        )
    section = raw.get(SECTION, {})
    known = isinstance(section, dict) and section.get("format", FORMAT) == FORMAT
    names = section.get("unused_tensors", []) if known else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} is of a format that this version cannot read: update mlx-redrafter.")
    return raw


def base_of(raw: Mapping[str, Any]) -> BaseIdentity | None:
    """The base model that a drafter's parsed config.json records, if any.

    Raises:
        ValueError: the record is damaged.
    """
    base = raw.get(SECTION, {}).get("base")
    if base is None:
        return None
    try:
        return BaseIdentity(**base)
    except TypeError as error:
        raise ValueError(f"the drafter records a damaged base model ({error}): convert it again.") from error


def read_weights(
    folder: Path, config: DrafterConfig, raw: Mapping[str, Any], dtype: mx.Dtype | None = None
) -> tuple[dict[str, mx.array], list[str]]:
    """All tensors of a drafter under their canonical names, lazy, and the names of those nothing reads.

    What is ``stored`` in fewer bits is of the ``dtype``, or of its scales'.

    Raises:
        ValueError: one is missing, damaged, there twice, or has another shape than config.json says.
    """
    weights, stored = _read_files(folder), None
    if (given := raw.get(SECTION, {}).get("stored")) is not None:
        from .stored import stored_as, unpack

        stored = stored_as(given, config, folder)
    unused = check_shapes(config, weights, folder, stored)
    return (weights if stored is None else unpack(config, weights, stored, dtype)), unused


def _read_files(folder: Path) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    for path in _weight_files(folder):
        for name, value in read_tensors(path).items():
            canonical = name
            for pattern, replacement in ALIASES.items():
                canonical = re.sub(pattern, replacement, canonical)
            if canonical in weights:
                raise ValueError(
                    f"{path} holds {name}, which is {canonical} a second time: keep one of them."
                )
            weights[canonical] = value
    return weights


def check_shapes(
    config: DrafterConfig,
    weights: Mapping[str, mx.array],
    where: object = "the drafter",
    stored: Quantization | None = None,
) -> list[str]:
    """Names of the tensors that nothing reads, after checking that all others fit the config.

    Raises:
        ValueError: a tensor is missing, or has another shape or type.
    """
    if config.num_draft_layers > len(weights):
        raise ValueError(f"{where} has {len(weights)} tensors, too few for {config.num_draft_layers} layers.")
    shapes = config.shapes(stored)
    for name, expected in shapes.items():
        if name not in weights:
            raise ValueError(
                f"{where} lacks the tensor {name} {list(expected)}: it is damaged or config.json is wrong."
            )
        found = tuple(weights[name].shape)
        if found != expected:
            raise ValueError(
                f"{where}: the tensor {name} has shape {list(found)}, but its config.json asks for "
                f"{list(expected)}: fetch or convert it again."
            )
        allowed = [mx.int32] if name == "draft_to_target" else [mx.float32, mx.float16, mx.bfloat16]
        if f"{name.removesuffix('weight')}scales" in shapes:
            allowed = [mx.uint32]
        if (dtype := weights[name].dtype) not in allowed:
            types = " or ".join(map(dtype_name, allowed))
            raise ValueError(f"{where}: the tensor {name} is {dtype_name(dtype)}, not {types}: convert it.")
    return sorted(set(weights) - set(shapes))


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(read_index(index))]
        for file in files:
            if file.parent != folder or file.suffix != ".safetensors":
                raise ValueError(f"{index} names {file.name!r}, which is not a safetensors file beside it.")
    else:
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        refuse_pickles(folder.iterdir(), FROM_PICKLE)
        raise ValueError(f"{folder} has no model.safetensors: fetch or convert the drafter again.")
    return files


def check_base(folder: Path, config: DrafterConfig, base: BaseIdentity | None, target: BaseIdentity) -> None:
    """Raise ``ValueError`` if a drafter is not for ``target``; only sizes count if it records no base."""
    if (config.hidden_size, config.vocab_size) != (target.hidden_size, target.vocab_size):
        found = base or f"hidden size {config.hidden_size} and vocabulary {config.vocab_size}"
    elif base is not None and not base.matches(target):
        found = base
    else:
        return
    raise ValueError(f"the drafter {folder} is for {found}, not for {target}: use the drafter of this model.")


def parse_config(folder: Path, raw: Mapping[str, Any]) -> DrafterConfig:
    """The sizes in a parsed config.json; ``ValueError`` names the file."""
    try:
        return DrafterConfig.from_dict(raw)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def cast(weights: Any, dtype: mx.Dtype | None, allowed: Callable[[str], bool] = lambda _: True) -> Any:
    """A tree of arrays, floats of ``allowed`` paths in ``dtype``; integers and packed weights as they are."""

    def one(path: str, x: mx.array) -> mx.array:
        return x.astype(dtype) if dtype and allowed(path) and mx.issubdtype(x.dtype, mx.floating) else x

    return tree_map_with_path(one, weights)


def check_values(folder: Path, config: DrafterConfig, weights: Mapping[str, mx.array]) -> None:
    """Raise ``ValueError`` if a weight is not finite or ``draft_to_target`` is not a set of token ids."""
    mx.eval(list(weights.values()))
    check_finite(folder, weights)
    if "draft_to_target" in weights:
        ids = np.array(weights["draft_to_target"])  # [Vd]
        if ids.min() < 0 or ids.max() >= config.vocab_size:
            raise ValueError(
                f"{folder}: draft_to_target names ids outside 0…{config.vocab_size - 1}: convert it again."
            )
        if len(np.unique(ids)) != len(ids):
            raise ValueError(f"{folder}: draft_to_target names an id twice: convert it again.")
