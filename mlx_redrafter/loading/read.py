"""Reading the files of models and drafters: JSON objects and safetensors, of which nothing is trusted."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FROM_PICKLE = (
    "convert it to safetensors, for example with transformers: "
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder, safe_serialization=True)."
)


def read_object(path: Path, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file and it is ``optional``.

    Raises:
        ValueError: it is missing, not JSON, or no object.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        if optional:
            return {}
        raise ValueError(f"{path.parent} holds no {path.name}: give the whole folder of a model.") from error
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({first_line(error)}): get it again.") from error
    if isinstance(content, dict):
        return content
    raise ValueError(f"{path} holds a {type(content).__name__}, not an object: get it again.")


def read_index(path: Path) -> set[str]:
    """The files of weights that a ``model.safetensors.index.json`` names; errors as ``read_object``."""
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path} has no weight_map: get it again.")
    return {str(name) for name in weight_map.values()}


def read_tensors(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file, lazily; ``ValueError`` if it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: get it again.")
    try:
        with safe_open(path, "numpy"):  # checks the header against the size of the file
            return dict(mx.load(str(path)))  # type: ignore[arg-type]
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = f"{path.resolve()} is damaged ({first_line(error)})"
        raise ValueError(f"{reason}: delete it and get it again.") from error


def check_finite(folder: Path, weights: Mapping[str, mx.array]) -> None:
    """Raise ``ValueError`` if a weight is NaN or infinite; they are looked at, and read, one by one."""
    for name, x in weights.items():
        if mx.issubdtype(x.dtype, mx.floating) and not mx.isfinite(x).all().item():
            where = f"{folder}: the tensor {name}"
            raise ValueError(f"{where} holds NaN or infinity in {dtype_name(x.dtype)}: get it again.")


def refuse_pickles(files: Iterable[Path], remedy: str = FROM_PICKLE) -> None:
    """Raise ``ValueError`` if one of the files is of a kind that can run code when it is read."""
    for path in sorted(files):
        if path.suffix.lower() in PICKLES:
            what = f"{path.parent} holds the pickle file {path.name}, which can run code when opened"
            raise ValueError(f"{what}: {remedy}")


def gguf_parts(path: Path) -> list[Path]:
    """Return the files of a split model, ``name-00001-of-00003.gguf`` and so on, or just ``path``."""
    if not (split := re.fullmatch(r"(.*-)\d{5}-of-(\d{5})(\.gguf)", path.name, re.IGNORECASE)):
        return [path]
    start, count, end = split.groups()
    return [path.with_name(f"{start}{number:05d}-of-{count}{end}") for number in range(1, int(count) + 1)]


def dtype_name(dtype: mx.Dtype) -> str:
    """As in ``float32``."""
    return str(dtype).removeprefix("mlx.core.")


def first_line(error: BaseException, length: int = 160) -> str:
    """What an error says, in short."""
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{text[:length]}".rstrip(".")
