"""Conversion of base models: a repository, a folder or a GGUF file becomes a folder that mlx-lm loads."""

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from mlx.nn.layers.base import Module
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder
from mlx_lm.utils import dequantize_model, quantize_model, save

from ..loading.base import DTYPES, cast_model, load_base
from ..loading.build_tokenizers import save_ends
from ..loading.files import atomic_folder, unfinished
from ..loading.find import find_model
from ..loading.gguf import convert_gguf
from ..loading.tokenizer import load_tokenizer
from ..models.drafter import Q_BITS, Q_GROUP_SIZES

MODES = {  # their numbers of bits and group sizes
    "affine": (Q_BITS, Q_GROUP_SIZES),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}
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
    gguf_quant: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Convert a base model to a folder that ``mlx_lm.load`` loads. The options are ``mlx_lm.convert``'s.

    Args:
        source: a Hugging Face repository id, a folder, a ``.gguf`` file, or a folder with just that. A
            GGUF file keeps its quantization as ``gguf_quant`` says unless ``quantize`` asks for another.
        quantize: what is quantized in the affine mode already is dequantized first.
        output: a folder that does not exist yet; appears whole or not at all.
        q_bits: bits per weight, None for the mode's usual number.
        q_group_size: weights per scale, None for the mode's usual number.
        q_mode: "affine", "mxfp4", "nvfp4" or "mxfp8".
        quant_predicate: one of mlx-lm's recipes of mixed bits (``QUANT_RECIPES``); affine only.
        dtype: "float16", "bfloat16" or "float32" for what is not quantized; None keeps the config's.
        revision: branch, tag or commit of the repository.
        trust_remote_code: run Python files that come with the model.
        gguf_quant: of a GGUF file's matrices: "nearest" (None too), "keep" or "float"; see ``convert_gguf``.
        progress: called with one line per stage.

    Raises:
        ValueError: anything wrong with the source or the options, in one line with the remedy.
    """
    options = {"q_bits": q_bits, "q_group_size": q_group_size, "q_mode": q_mode}
    _check_options(quantize, dequantize, dtype=dtype, quant_predicate=quant_predicate, **options)
    say = progress or (lambda _: None)
    with atomic_folder(output) as result, unfinished(result.parent) as unpacked:
        folder = find_model(str(source), revision)
        gguf = folder if folder.is_file() else None
        if gguf_quant and not gguf:
            raise ValueError(f"--gguf-quant is for GGUF files, and {source} is none: leave it out.")
        as_it_is = gguf is not None and not (quantize or dequantize or dtype)
        if gguf:
            folder = result if as_it_is else unpacked
            convert_gguf(gguf, folder, say, quant=gguf_quant or "nearest")
        if not as_it_is:
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


def _check_options(quantize: bool, dequantize: bool, **values: Any) -> None:
    if quantize and dequantize:
        raise ValueError("-q and -d exclude each other: choose one, not both.")
    bits, sizes = MODES.get(values["q_mode"], ((), ()))
    allowed: dict[str, Any] = {"dtype": DTYPES, "quant_predicate": QUANT_RECIPES}
    for name, choices in {**allowed, "q_mode": MODES, "q_bits": bits, "q_group_size": sizes}.items():
        if values[name] is not None and values[name] not in choices:
            choices = ", ".join(map(str, choices))
            raise ValueError(f"--{name.replace('_', '-')} is {values[name]!r}: choose one of {choices}.")
    if not quantize and any(values[name] not in (None, "affine") for name in values.keys() - {"dtype"}):
        raise ValueError("--q-bits, --q-group-size, --q-mode and --quant-predicate need -q.")
    if values["quant_predicate"] and (values["q_mode"] != "affine" or values["q_bits"]):
        raise ValueError("--quant-predicate sets the mode and the bits: leave out --q-mode and --q-bits.")


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
