"""The folder that programs without Python decode from: functions, weights, tokenizer and a manifest of them.

``docs/without-python.md`` says how it is read.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..decoding.state import DraftShape
from ..loading.cache import versions
from ..loading.files import atomic_folder
from ..loading.read import dtype_name
from ..model import SpeculativeModel
from ..models.identity import identity_of
from ..record import describe_shape
from ..text import check_shape
from .functions import DTYPES, Function, Functions, shape_word

FORMAT = 1
WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"
CONTEXT = 4096  # tokens, if the model has so many
USUAL = DraftShape(2, 3, 5, 4)  # five rows cost little more than one, with 4-bit weights too
SHAPE = re.compile(r"(\d+)x(\d+)(?:\+(\d+))?(?:@(\d+))?")
INPUTS = {
    "tokens": "the prompt's tokens after the state's `token`; anything after the first `count`",
    "count": "how many of them are the prompt's, 1 or more",
    "key": "the upper and the lower half of a seed of 64 bits",
    "temperature": "0 picks the likeliest token",
    "top_p": "keeps the likeliest tokens that together have this probability; 0 or 1: off",
    "top_k": "keeps this many of the likeliest tokens; 0: off",
    "min_p": "drops tokens less likely than this share of the likeliest one; 0: off",
}
OUTPUTS = {
    "tokens": "what the step says; anything after the first `count`",
    "count": "how many tokens it says",
}
STATE = {
    "token": "the last token; before the first call, put the prompt's first token here",
    "rows": "tokens that the buffers hold: all of the text but the last",
    "context": "what the drafter reads of the model",
    "history": "the text, from which tokens are copied",
    "record": "how often copies were right",
    "path_start": "where the rows of the path belong",
    "layer": "what a layer keeps of every token, such as keys or values",
    "path": "rows of a layer that the next call writes to their places",
    "recurrent": "what a recurrent layer keeps of the text",
}
Progress = Callable[[int, int], None]


def read_shape(text: str) -> DraftShape:
    """The draft shape that is written as WIDTHxLENGTH+LOOKUP@NODES; the last two may be left out.

    Raises:
        ValueError: it is written in another way, or is not usable.
    """
    found = SHAPE.fullmatch(text)
    if found is None:
        raise ValueError(
            f"--shape {text!r} is not usable: give beam width x length, such as 2x3, and if wanted "
            "+ tokens to copy, and @ the most nodes, such as 2x3+4@5."
        )
    width, length, lookup, nodes = (int(part) if part else None for part in found.groups())
    return DraftShape(width or 0, length or 0, nodes, lookup or 0)


def export_functions(
    model: SpeculativeModel,
    tokenizer: TokenizerWrapper,
    output: str | Path,
    shapes: Sequence[DraftShape] = (),
    context: int | None = None,
    name: str = "",
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Write a model's functions for MLX's default device, and return their manifest.

    Args:
        model: with its drafter, if there is one.
        tokenizer: of the model.
        output: a folder that does not exist yet; appears whole or not at all.
        shapes: one or two that steps draft; by default one.
        context: tokens that a text may have; by default 4096, or the model's if it has fewer.
        name: of the model; told to people.
        progress: called with functions that are written and their total.

    Raises:
        ValueError: the model cannot be exported, or an option does not fit it.
    """
    context = usable_context(context, model.context_length)
    if (runner := model.prepare()) is None:
        raise ValueError(f"{name or 'the model'} cannot be exported: {model.refusal}")
    drafter = model.drafter
    shapes = list(shapes) or [USUAL if drafter else DraftShape(0, 0, None, USUAL.lookup)]
    if len(shapes) > 2:
        raise ValueError(
            f"{len(shapes)} draft shapes are more than can be exported: give one or two --shape."
        )
    for shape in shapes:
        if shape.width and drafter is None:
            raise ValueError(
                f"--shape {shape_word(shape)} needs a drafter: name one with --drafter, or give a shape that "
                "only copies, such as 0x0+4."
            )
        check_shape(shape, drafter.config.head_outputs if drafter else None)
    with atomic_folder(Path(output)) as folder, writable():
        functions = Functions(runner, shapes, context)
        calls = [
            (each, size)
            for each in functions.every
            for size in functions.capacities
            if functions.fits(each, size)
        ]
        for done, (function, size) in enumerate(calls):
            progress(done, len(calls))
            write_function(folder / file_of(function, size), functions, function, size, name)
        progress(len(calls), len(calls))
        mx.save_safetensors(str(folder / WEIGHTS), dict(functions.weights), {"format": "mlx"})
        others = set(folder.iterdir())
        tokenizer.save_pretrained(folder)
        told = {
            "format": FORMAT,
            "model": name or identity_of(model.model).model_type,
            "versions": versions(),
            "device": "gpu" if mx.default_device().type == mx.gpu else "cpu",
            "context": context,
            "vocabulary": runner.target.vocabulary,
            "stop": sorted(tokenizer.eos_token_ids),
            "step": shape_word(functions.shapes[-1] if len(functions.shapes) < 3 else functions.shapes[1]),
            **described(functions),
            "weights": {"file": WEIGHTS, "arrays": listed(functions.weights)},
            "tokenizer": sorted(path.name for path in set(folder.iterdir()) - others),
            "sha256": {path.name: digest(path) for path in sorted(folder.iterdir())},
        }
        (folder / MANIFEST).write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    return told


def usable_context(asked: int | None, known: int | None) -> int:
    """Tokens that a text may have; ``ValueError`` if it is asked for more than the model was made for."""
    if asked is None:
        return min(CONTEXT, known or CONTEXT)
    if asked < 2:
        raise ValueError(f"--context {asked} is not usable: give 2 or more.")
    if known is not None and asked > known:
        raise ValueError(f"--context {asked} exceeds the model's context of {known}: give at most that.")
    return asked


@contextmanager
def writable() -> Iterator[None]:
    """Let graphs have no parts that MLX cannot write: compiled ones, and copies that only change a layout."""
    contiguous: Any = mx.contiguous
    mx.disable_compile()
    mx.contiguous = lambda x, *args, **kwargs: x  # type: ignore[assignment]
    try:
        yield
    finally:
        mx.contiguous = contiguous
        mx.enable_compile()


def write_function(path: Path, functions: Functions, function: Function, capacity: int, name: str) -> None:
    """Trace a function and write it; ``ValueError`` if that cannot be done with the model's code."""
    example = functions.example(function, capacity)
    try:
        mx.export_function(str(path), partial(functions.call, function, capacity), *example)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        kind = identity_of(functions.target.model).model_type
        reason = str(error).partition("\n")[0].removeprefix("[export_function] ").rstrip(".")
        raise ValueError(
            f"{name or 'the model'} (model type {kind}) cannot be exported: {reason}."
        ) from error


def file_of(function: Function, capacity: int) -> str:
    """Where a function for a capacity is."""
    return f"{function.name}.{capacity}.mlxfn"


def described(functions: Functions) -> dict[str, Any]:
    """The capacities, the state and the functions."""
    sizes = functions.capacities
    starts = [functions.start(size) for size in sizes]
    state = [
        {
            "name": name,
            "dtype": dtype_name(array.dtype),
            "shapes": [list(start[name].shape) for start in starts],
            "meaning": STATE[name.partition(".")[0]],
        }
        for name, array in starts[0].items()
    ]
    every = []
    for each in functions.every:
        kind: dict[str, Any] = {
            "kind": "step",
            "step": shape_word(each.shape),
            "shape": describe_shape(each.shape),
            "sampling": each.sampling,
        }
        if each.chunk:
            kind = {"kind": "prefill", "tokens": each.chunk}
        every.append(
            {
                "name": each.name,
                **kind,
                "room": functions.room(each),
                "inputs": arguments(each.inputs, INPUTS),
                "outputs": arguments(each.outputs, OUTPUTS),
                "files": [file_of(each, size) if functions.fits(each, size) else "" for size in sizes],
            }
        )
    return {"capacities": sizes, "state": state, "functions": every}


def arguments(shapes: Mapping[str, tuple[int, ...]], meanings: Mapping[str, str]) -> list[dict[str, Any]]:
    """What a function is given or gives, in its order."""
    return [
        {
            "name": name,
            "dtype": dtype_name(DTYPES.get(name, mx.int32)),
            "shape": list(shape),
            "meaning": meanings[name],
        }
        for name, shape in shapes.items()
    ]


def listed(arrays: Mapping[str, mx.array]) -> list[dict[str, Any]]:
    """Arrays by name, in their order."""
    return [
        {"name": name, "dtype": dtype_name(array.dtype), "shape": list(array.shape)}
        for name, array in arrays.items()
    ]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
