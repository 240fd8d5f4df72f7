"""Base models: a Hugging Face repository, a folder or a GGUF file becomes a folder that mlx-lm loads."""

import importlib.util
import inspect
import io
import json
import os
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from mlx.nn.layers.base import Module
from mlx_lm.convert import MODEL_CONVERSION_DTYPES, QUANT_RECIPES, mixed_quant_predicate_builder
from mlx_lm.utils import MODEL_REMAPPING, dequantize_model, load_model, quantize_model, save
from safetensors import SafetensorError, safe_open

from ..models.bundle import PICKLES, cast
from ..models.drafter import Q_BITS, Q_GROUP_SIZES
from .files import atomic_folder, unfinished
from .gguf import convert_gguf
from .tokenizers import load_tokenizer, save_ends

_DOWNLOADED = ["*.json", "model*.safetensors", "*.py", "*.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja"]
_MODES = {  # their numbers of bits and group sizes
    "affine": (Q_BITS, Q_GROUP_SIZES),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}
# What mlx-lm's code raises on a config.json that is not right.
LOAD_ERRORS = (
    ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError,
    OSError, MemoryError, ImportError,
)  # fmt: skip
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")  # in a config.json
CARD = (  # the README.md of a converted model
    "---\nlibrary_name: mlx\ntags:\n- mlx\n---\n\n# An MLX model\n\n"
    "Converted from {} by mlx-redrafter, for mlx-lm and mlx-redrafter.\n"
)
Progress = Callable[[str], None]


def convert_base(
    source: str | Path,
    output: Path,
    *,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    quant_predicate: str | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> None:
    """Convert a base model to a folder that ``mlx_lm.load`` loads. The options are ``mlx_lm.convert``'s.

    Args:
        source: a Hugging Face repository id, a folder, a ``.gguf`` file, or a folder with just that. A
            GGUF file keeps its quantization exactly unless ``quantize`` asks for another.
        quantize: what is quantized in the affine mode already is dequantized first.
        output: a folder that does not exist yet; appears whole or not at all.
        q_bits: bits per weight, None for the mode's usual number.
        q_group_size: weights per scale, None for the mode's usual number.
        q_mode: "affine", "mxfp4", "nvfp4" or "mxfp8".
        quant_predicate: one of mlx-lm's recipes of mixed bits (``QUANT_RECIPES``); affine only.
        dtype: "float16", "bfloat16" or "float32" for what is not quantized; None keeps the config's.
        revision: branch, tag or commit of the repository.
        trust_remote_code: run Python files that come with the model.
        progress: called with one line per stage.

    Raises:
        ValueError: anything wrong with the source or the options, in one line with the remedy.
    """
    options = {"q_bits": q_bits, "q_group_size": q_group_size, "q_mode": q_mode}
    _check_options(quantize, dequantize, dtype=dtype, quant_predicate=quant_predicate, **options)
    say = progress or (lambda _: None)
    gguf = find_gguf(source)
    as_it_is = gguf is not None and not (quantize or dequantize or dtype)
    with atomic_folder(output) as result, unfinished(result.parent) as unpacked:
        if gguf:
            convert_gguf(gguf, result if as_it_is else unpacked, say)
        if not as_it_is:
            folder = unpacked if gguf else base_folder(source, revision)
            say(f"loading {source}")
            model, config = load_base(folder, trust_remote_code)
            tokenizer = load_tokenizer(
                folder,
                name=str(gguf or ("" if Path(source).is_dir() else source)),
                eos_token_ids=config.get("eos_token_id"),
                trust_remote_code=trust_remote_code,
            )
            if dequantize and not _quantized(model):
                raise ValueError(f"{source} is not quantized: leave out --dequantize.")
            again = quantize and config.get("quantization", {}).get("mode", "affine") == "affine"
            model, config = _float(model, config, dtype, dequantize or again, exact=gguf is not None)
            if quantize:
                model, config = _quantize(model, config, say, quant_predicate, **options)
            say(f"writing {output}")
            save(result, folder, model, tokenizer, config)
            save_ends(result, tokenizer)
        card = result / "README.md"
        if not card.exists():
            card.write_text(CARD.format(source), "utf-8", "replace")


def base_folder(source: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a Hugging Face model, downloading it unless ``source`` is a folder.

    Raises:
        ValueError: no such folder and no such repository, or it holds no safetensors weights.
    """
    path = Path(os.path.expanduser(source))
    if source and path.is_dir():
        _check_weight_format(str(source), [file.name for file in path.iterdir()])
        return path
    if path.is_file():
        if path.suffix in PICKLES:
            raise ValueError(
                f"{source} is a pickle file, which can run code: convert it to safetensors{_HOW}"
            )
        raise ValueError(f"{source} is a file: give the model's folder.")
    try:
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=_DOWNLOADED))
        files = [file.name for file in folder.glob("*.safetensors")]
        files = files or list_repo_files(str(source), revision=revision)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(
            f"{source} is neither a folder nor a repository that can be downloaded ({_first_line(error)}):"
            " check the name, the connection and the disk, or give a local folder."
        ) from error
    _check_weight_format(str(source), files)
    return folder


def find_gguf(source: str | Path) -> Path | None:
    """Return the GGUF file ``source`` is, or is a folder of; None for any other source.

    Raises:
        ValueError: the folder holds several, or ``source`` is named like a GGUF file and missing.
    """
    path = Path(os.path.expanduser(source))
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ValueError(f"{source} does not exist: check the path.")
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if len(files) > 1:
        raise ValueError(f"{source} holds {len(files)} GGUF files: name one, such as {files[0]}.")
    return files[0] if files else None


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
            f"mlx-lm cannot load {folder} ({_first_line(error)}): check its config.json."
        ) from error
    return model, config


_HOW = (
    ", for example with transformers: AutoModelForCausalLM.from_pretrained(folder)"
    ".save_pretrained(new_folder, safe_serialization=True)."
)


def _check_options(quantize: bool, dequantize: bool, **values: Any) -> None:
    if quantize and dequantize:
        raise ValueError("-q and -d exclude each other: choose one, not both.")
    bits, sizes = _MODES.get(values["q_mode"], ((), ()))
    allowed: dict[str, Any] = {"dtype": MODEL_CONVERSION_DTYPES, "quant_predicate": QUANT_RECIPES}
    for name, choices in {**allowed, "q_mode": _MODES, "q_bits": bits, "q_group_size": sizes}.items():
        if values[name] is not None and values[name] not in choices:
            choices = ", ".join(map(str, choices))
            raise ValueError(f"--{name.replace('_', '-')} is {values[name]!r}: choose one of {choices}.")
    if not quantize and any(values[name] not in (None, "affine") for name in values.keys() - {"dtype"}):
        raise ValueError("--q-bits, --q-group-size, --q-mode and --quant-predicate need -q.")
    if values["quant_predicate"] and (values["q_mode"] != "affine" or values["q_bits"]):
        raise ValueError("--quant-predicate sets the mode and the bits: leave out --q-mode and --q-bits.")


def _check_weight_format(source: str, files: list[str]) -> None:
    """Refuse a model without safetensors, naming the pickle or GGUF file it has instead."""
    if any(name.endswith(".safetensors") for name in files):
        return
    for name in sorted(files):
        if name.endswith(PICKLES):
            danger = f"the pickle file {name}, which can run code"
            raise ValueError(f"{source} holds only {danger}: convert it to safetensors{_HOW}")
        if name.endswith(".gguf"):
            raise ValueError(f"{source} holds GGUF files: download one, such as {name}, and give its path.")
    raise ValueError(f"{source} holds no model*.safetensors: download the weights too.")


def _check_config(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    config = _json_object(folder / "config.json")
    name, own_code = str(config.get("model_type")), config.get("model_file")
    if own_code and not trust_remote_code:
        raise ValueError(f"{folder} needs its own code, {own_code!r}: --trust-remote-code runs it.")
    known = name.isidentifier() and importlib.util.find_spec(
        f"mlx_lm.models.{MODEL_REMAPPING.get(name, name)}"
    )
    if not (known or own_code):
        raise ValueError(f"mlx-lm has no model_type {name!r} ({folder}): update mlx-lm or use another model.")
    return config


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
    shards = sorted(folder.glob("model*.safetensors"))
    listed = _listed(folder, shards)
    if missing := sorted(listed - {shard.name for shard in shards}):
        raise ValueError(
            f"{folder} lacks {missing[0]}, by its index or the names of its other files: get that file too."
        )
    if not shards:
        _check_weight_format(str(folder), [file.name for file in folder.iterdir()])
        raise ValueError(f"{folder} holds no model*.safetensors: get the weights, or give them that name.")
    owners: dict[str, str] = {}
    for shard in shards:
        try:
            with safe_open(shard, "numpy"):
                weights = dict(mx.load(str(shard)))  # type: ignore[arg-type]
        except (SafetensorError, RuntimeError, OSError) as error:
            raise ValueError(
                f"{shard.resolve()} is damaged ({_first_line(error)}): delete it and get the model again."
            ) from error
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


def _listed(folder: Path, shards: list[Path]) -> set[str]:
    """The names of all files of weights, by the index, else by names as model-00001-of-00002."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = _json_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map: get the model again.")
        return {str(name) for name in weight_map.values()}
    names = [re.fullmatch(r"(.+-)\d{5}-of-(\d{5})(\..+)", shard.name) for shard in shards]
    return {f"{m[1]}{number:05d}-of-{m[2]}{m[3]}" for m in names if m for number in range(1, int(m[2]) + 1)}


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} holds no {path.name}: give a folder with a whole model.") from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({_first_line(error)}): get the model again.") from error
    if isinstance(content, dict):
        return content
    raise ValueError(f"{path} holds a {type(content).__name__}, not an object: get the model again.")


def _float(
    model: Module, config: dict[str, Any], dtype: str | None, dequantize: bool, exact: bool
) -> tuple[Module, dict[str, Any]]:
    """The model in ``dtype``, or the config's, and dequantized if need be, ``exact``-ly in float32."""
    nested = config.get("text_config")
    known = config.get("torch_dtype") or (nested if isinstance(nested, dict) else {}).get("dtype")
    if dtype is not None:
        config = config | {key: dtype for key in ("torch_dtype", "dtype") if key in config}
    if dequantize:
        cast_model(model, "float32" if exact else dtype or known)
        config = {key: value for key, value in config.items() if not key.startswith("quantization")}
        model = dequantize_model(model)
    cast_model(model, dtype or known)
    return model, config


def _quantize(
    model: Module, config: dict[str, Any], say: Progress, recipe: str | None, **options: Any
) -> tuple[Module, dict[str, Any]]:
    """The model with all layers quantized that are not yet."""
    before, size = _quantized(model), options["q_group_size"]
    predicate: Any = recipe and mixed_quant_predicate_builder(recipe, model, size or 64)
    with redirect_stdout(io.StringIO()) as said:
        model, config = quantize_model(
            model, config, size, options["q_bits"], mode=options["q_mode"], quant_predicate=predicate
        )
    say(said.getvalue().strip())
    if _quantized(model) > before:
        return model, config
    if before:
        raise ValueError("the model is quantized already: dequantize it first (-d), then quantize that.")
    raise ValueError("the group size divides no layer's width: give --q-group-size 64 or 32.")


def _quantized(model: Module) -> int:
    """How many layers are quantized."""
    return sum(hasattr(module, "bits") for _, module in model.named_modules())


def cast_model(model: Module, dtype: Any) -> None:
    """Give the float parameters that the model allows to be cast this type; unless it is none of three."""
    if dtype in MODEL_CONVERSION_DTYPES:
        allowed = getattr(model, "cast_predicate", lambda _: True)
        model.update(cast(model.parameters(), getattr(mx, dtype), allowed))


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{text[:160]}".rstrip(".")
