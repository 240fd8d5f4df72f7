"""Conversion of drafters: from Apple's layout (or a bundle) to a bundle, and back.

On the way a drafter may be cast, quantized and trimmed to the tokens that occur most often; one that was
not trimmed or quantized goes back to Apple's layout bit for bit.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import mlx.core as mx
import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from ..conversations import Row, read_rows
from ..loading.base import DTYPES, load_base
from ..loading.files import atomic_file, atomic_folder, check_writable, shell_word
from ..loading.find import drafter_folder, find_drafter, model_folder
from ..loading.hub import download
from ..loading.search import search_drafter
from ..loading.tokenizer import load_tokenizer
from ..models import bundle
from ..models.drafter import DrafterConfig, Quantization
from ..models.identity import BaseIdentity, identity_of
from ..models.save import write_drafter
from ..models.stored import pack

DRAFTER_GROUP_SIZE = 32  # weights per scale: 4 bits keep 98.4 % of the tokens per step, with 64 97.6 %
LINES_AT_ONCE = 256

Counts = np.ndarray[tuple[int], np.dtype[np.int64]]
Tokenizer = Any  # it has ``encode``; with a ``chat_template``, also ``apply_chat_template``


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote: where, the drafter's sizes, its base if known, tensors nothing reads."""

    folder: Path
    config: DrafterConfig
    base: BaseIdentity | None
    unused: list[str]


def convert_drafter(
    source: str | Path,
    output: str | Path,
    *,
    base: str | Path | BaseIdentity | None = None,
    q_bits: int | None = None,
    q_group_size: int = DRAFTER_GROUP_SIZE,
    store_bits: int | None = None,
    dtype: str | None = None,
    draft_vocab: int | None = None,
    frequencies: str | Path | None = None,
    save_frequencies: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Converted:
    """Write the bundle of a drafter.

    Args:
        source: a folder in Apple's layout, a bundle, or a Hugging Face repository of either; "auto": the one
            that is found for ``base``.
        output: the bundle's folder; must not exist.
        base: the base model the drafter belongs to (folder, repository or identity); the bundle
            refuses every other. None keeps what the source records, if anything.
        q_bits: quantize every linear layer whose input width is a multiple of ``q_group_size``.
        store_bits: of every weight of such layers on disk only; they are floats again once they are loaded.
        dtype: cast to "float16", "bfloat16" or "float32"; None keeps each tensor's.
        draft_vocab: keep only this many output tokens, the most frequent ones.
        frequencies: what they are counted in: text, JSONL or JSON conversations, or a count file.
        save_frequencies: write the counts there (.json or .npz), to be given as ``frequencies``.
        tokenizer: counts text; by default the one of ``base``.
        revision: of the repository ``source``.
        trust_remote_code: allow Python code in the folder of ``base``.
        progress: show bars on stderr.
    Raises:
        ValueError: an argument is not valid, or the source is damaged or belongs to another base.
    """
    quantization = None if q_bits is None else Quantization(q_bits, q_group_size)
    stored = None if store_bits is None else Quantization(store_bits)
    check_output(output)
    _check_frequency_arguments(draft_vocab, frequencies, save_frequencies)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}.")
    if source == "auto" and base is None:
        raise ValueError("--drafter auto finds the drafter of a base model: name that with --model.")
    known = load_identity(base, trust_remote_code) if base is not None and source == "auto" else None
    folder = found_for(known) if known else drafter_folder(source, revision=revision)
    raw = bundle.read_config(folder)
    config = bundle.parse_config(folder, raw)
    weights, unused = bundle.read_weights(folder, config, raw)
    bundle.check_values(folder, config, {name: weights[name] for name in config.shapes()})
    if draft_vocab is not None and draft_vocab > (most := config.head_outputs):
        asked = f"a draft vocabulary of {draft_vocab} tokens"
        raise ValueError(f"{asked}: the drafter has {most}, keep at most these.")
    identity = recorded = bundle.base_of(raw)
    if base is not None:
        identity = known or load_identity(base, trust_remote_code)
        bundle.check_base(folder, config, recorded, identity)
    if frequencies is not None:
        tokenizer = tokenizer or _tokenizer(base, frequencies, trust_remote_code)
        counts = count_tokens(frequencies, config.vocab_size, tokenizer, progress)
        if save_frequencies is not None:
            save_counts(save_frequencies, counts)
        if draft_vocab is not None:
            config, weights = trim(config, weights, counts, draft_vocab)
    if dtype is not None:
        weights = bundle.cast(weights, getattr(mx, dtype))
    if quantization is not None:
        config, weights = quantize(config, weights, quantization, progress)
    extra = {"source_config": _source_config(raw, dtype)}
    write_drafter(output, config, weights, identity, extra, drafter_card(config, identity), stored)
    return Converted(Path(output), config, identity, unused)


def found_for(base: BaseIdentity) -> Path:
    """The folder of the drafter that ships, or is found, for a base; ``ValueError`` if there is none."""
    found = find_drafter(base) or search_drafter(base)
    if found is None:
        raise ValueError(f"no drafter was found for {base}: name one with --drafter, or train one.")
    return found


def export_drafter(source: str | Path, output: str | Path) -> None:
    """Write a bundle back to Apple's layout: the tensors bit for bit, the original config.json entries.

    Raises:
        ValueError: it is trimmed or quantized, reads several layers, or has a gated cell or a memory, which
            Apple's layout cannot express.
    """
    check_output(output)
    folder = drafter_folder(source)
    raw = bundle.read_config(folder)
    config = bundle.parse_config(folder, raw)
    weights, _ = bundle.read_weights(folder, config, raw)
    for changed, how in (
        (config.draft_vocab_size, "trimmed vocabulary"),
        (config.quantization, "quantization"),
        (config.context_layers, "context of several layers"),
        (config.cell != "simple", "gated cell"),
        (config.memory_heads, "memory of the text"),
        (raw.get(bundle.SECTION, {}).get("stored"), "stored form of fewer bits"),
    ):
        if changed:
            raise ValueError(
                f"{folder} has a {how}, which Apple's layout lacks: export the original drafter."
            )
    with atomic_folder(Path(output)) as temporary:
        (temporary / "config.json").write_text(json.dumps(_source_config(raw), indent=2) + "\n", "utf-8")
        mx.save_safetensors(str(temporary / "model.safetensors"), weights, {"format": "pt"})


def trim(
    config: DrafterConfig, weights: Mapping[str, mx.array], counts: Counts, size: int
) -> tuple[DrafterConfig, dict[str, mx.array]]:
    """Keep the head's rows of the ``size`` most frequent tokens, ties and zeros by lower id.

    Args:
        counts: int64 [V], how often each token occurs.
    Returns:
        the new config, and the weights with ``draft_to_target`` int32 [size], ascending.
    """
    if "draft_to_target" in weights:
        candidates = np.array(weights["draft_to_target"])  # [Vd]
    else:
        candidates = np.arange(config.vocab_size, dtype=np.int32)  # [V]
    best = np.lexsort((candidates, -counts[candidates]))[:size]
    rows = best[np.argsort(candidates[best])]  # [size]
    head = f"lm_head.{config.num_draft_layers}."
    trimmed = {name: x[mx.array(rows)] if name.startswith(head) else x for name, x in weights.items()}
    trimmed["draft_to_target"] = mx.array(candidates[rows].astype(np.int32))
    return replace(config, draft_vocab_size=size), trimmed


def quantize(
    config: DrafterConfig, weights: Mapping[str, mx.array], quantization: Quantization, progress: bool = False
) -> tuple[DrafterConfig, dict[str, mx.array]]:
    """Quantize every linear layer whose input width is a multiple of the group size.

    Raises:
        ValueError: the drafter is quantized already, or no layer fits.
    """
    if config.quantization is not None:
        raise ValueError("the drafter is quantized already: quantize the one it was made from.")
    packed = pack(config, weights, quantization)
    result = dict(tqdm(packed, "quantizing", unit=" tensors", disable=not progress))
    return replace(config, quantization=quantization), result


def count_tokens(
    path: str | Path, vocab_size: int, tokenizer: Tokenizer | None = None, progress: bool = False
) -> Counts:
    """How often each token occurs in a file.

    Args:
        path: a count file (.npz, or .json with "counts"), conversations (.jsonl, or .json with a
            list) or, under any other name, text.
        vocab_size: V; a token beyond it is an error.
        tokenizer: needed for all but count files; its chat template, if any, formats conversations.
    Returns:
        int64 [V]
    Raises:
        ValueError: the file is missing, empty or damaged, or holds tokens beyond the vocabulary.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name a file of text, conversations or counts.")
    if (counts := _load_counts(path, vocab_size)) is not None:
        return counts
    if tokenizer is None:
        raise ValueError(
            f"{path} is text, which takes the base model's tokenizer to count: name it with --model."
        )
    counts = np.zeros(vocab_size, np.int64)  # [V]
    pieces = _encoded(path, tokenizer)
    for ids in tqdm(pieces, f"counting {path.name}", unit=" pieces", disable=not progress):
        if ids and max(ids) >= vocab_size:
            raise ValueError(
                f"the tokenizer makes token {max(ids)}, but the drafter's vocabulary has {vocab_size}: "
                "name the drafter's own base model."
            )
        np.add.at(counts, ids, 1)
    if not counts.any():
        raise ValueError(f"{path} holds no text: name a file of text, conversations or counts.")
    return counts


def save_counts(path: str | Path, counts: Counts) -> None:
    """Write counts int64 [V] as .npz or .json, for ``count_tokens`` to read."""
    with atomic_file(Path(path)) as temporary:
        if temporary.suffix == ".npz":
            np.savez_compressed(temporary, counts=counts)
        else:
            seen = {str(token): int(counts[token]) for token in np.flatnonzero(counts)}
            temporary.write_text(json.dumps({"vocab_size": len(counts), "counts": seen}) + "\n", "utf-8")


def drafter_card(config: DrafterConfig, base: BaseIdentity | None) -> str:
    """The README.md of a converted drafter."""
    model = base.name if base is not None and base.name else "BASE_MODEL"
    header = f"base_model: {model}\n" if "/" in model else ""
    bits = f", {config.quantization.bits}-bit" if config.quantization else ""
    tags = "\n".join(f"- {tag}" for tag in ("mlx", "redrafter", *(base.tags() if base else ())))
    return (
        f"---\nlibrary_name: mlx-redrafter\n{header}tags:\n{tags}\n---\n\n"
        "# A recurrent drafter\n\n"
        f"It makes {base or 'its base model'} generate faster without changing its output "
        "([ReDrafter](https://arxiv.org/abs/2403.09919)).\n\n"
        f"{config.num_draft_layers} residual blocks of width {config.exit_dim}, {config.head_outputs} of "
        f"{config.vocab_size} tokens{bits}.\n\n"
        "```bash\npip install mlx-redrafter\n"
        f'mlx-redrafter generate --model {shell_word(model)} --drafter THIS_FOLDER --prompt "Hello"\n```\n'
    )


def check_output(output: str | Path) -> None:
    """Raise ``ValueError`` if a folder is there already, or cannot be made."""
    path = Path(output)
    if os.path.lexists(path):
        raise ValueError(f"{str(output)!r} exists already: delete it or name another output folder.")
    check_writable(path)


def _check_frequency_arguments(size: int | None, source: str | Path | None, save: str | Path | None) -> None:
    if size is not None and size < 1:
        raise ValueError(f"a draft vocabulary of {size} tokens: keep at least 1.")
    if source is None:
        remedy = "--frequencies: a file to count tokens in."
        if size is not None:
            raise ValueError(f"a draft vocabulary of {size} tokens needs {remedy}")
        if save is not None:
            raise ValueError(f"counts to save in {save} need {remedy}")
        return
    if size is None and save is None:
        raise ValueError(f"the counts of {source} are not used: add --draft-vocab or --save-frequencies.")
    if not Path(source).is_file():
        raise ValueError(f"{source} does not exist: name a file of text, conversations or counts.")
    if save is None:
        return
    if Path(save).suffix not in (".json", ".npz"):
        raise ValueError(f"counts cannot be saved as {save}: name a .json or .npz file.")
    if Path(save).is_dir() or not Path(save).absolute().parent.is_dir():
        raise ValueError(f"counts cannot be saved as {save}: name a file in a folder that exists.")
    check_writable(save)


def is_drafter(source: str, revision: str | None) -> bool:
    """Whether a folder or a repository holds a drafter."""
    path = Path(source)
    try:
        folder = path if path.exists() else download(source, revision, ("config.json",))
        bundle.read_config(folder)
    except ValueError:
        return False  # whatever is wrong with it, the conversion of base models says it better
    return True


def load_identity(base: str | Path | BaseIdentity, trust_remote_code: bool = False) -> BaseIdentity:
    """The identity of a base model: a folder, a GGUF file or a repository. Reads a few rows of it.

    Raises:
        ValueError: it cannot be loaded.
    """
    if isinstance(base, BaseIdentity):
        return base
    try:
        model, _ = load_base(model_folder(str(base)), trust_remote_code, check_values=False)
    except ValueError as error:
        raise ValueError(
            f"the base model {base} cannot be loaded ({error}): name the drafter's base."
        ) from error
    return identity_of(model, Path(base).resolve().name if Path(base).exists() else str(base))


def _tokenizer(base: object, frequencies: str | Path, trust_remote_code: bool) -> Tokenizer | None:
    if base is None or isinstance(base, BaseIdentity) or Path(frequencies).suffix == ".npz":
        return None
    return load_tokenizer(model_folder(str(base)), name=str(base), trust_remote_code=trust_remote_code)


def _source_config(raw: Mapping[str, Any], dtype: str | None = None) -> dict[str, Any]:
    """The config.json of the checkpoint that a bundle was made from, with the dtype it was cast to."""
    plain = {key: value for key, value in raw.items() if key != bundle.SECTION}
    source = dict(raw.get(bundle.SECTION, {}).get("source_config", plain))
    if dtype is not None:
        source.update({key: dtype for key in ("torch_dtype", "dtype") if key in source})
    return source


def _load_counts(path: Path, vocab_size: int) -> Counts | None:
    """The counts in a file of them; None if it holds something else."""
    remedy = "count with this drafter's base."
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                values = np.asarray(arrays["counts"])
        except (OSError, ValueError, KeyError, EOFError, MemoryError, BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is not a file of counts ({error}): {remedy}") from error
    elif path.suffix == ".json" and isinstance(raw := _json(path), dict) and "counts" in raw:
        values = np.zeros(vocab_size, np.int64)  # [V]
        try:
            seen = {int(token): count for token, count in raw["counts"].items()}
            if raw["vocab_size"] != vocab_size or not all(0 <= token < vocab_size for token in seen):
                raise ValueError(f"made for another vocabulary than {vocab_size}")
            values[list(seen)] = list(seen.values())
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise ValueError(f"{path} is not a usable file of counts ({error}): {remedy}") from error
    else:
        return None
    if values.shape != (vocab_size,) or not np.issubdtype(values.dtype, np.integer) or values.min() < 0:
        raise ValueError(f"{path} does not hold the counts of {vocab_size} tokens: {remedy}")
    return values.astype(np.int64)


def _json(path: Path) -> Any:
    """What a JSON file holds; None if it is no JSON."""
    with suppress(ValueError, RecursionError):
        return json.loads(path.read_text("utf-8-sig", errors="replace"))


def _encoded(path: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token ids of a file, piece by piece; warns of rows that are unusable."""
    if path.suffix not in (".json", ".jsonl"):
        with path.open(encoding="utf-8-sig", errors="replace") as lines:
            while text := "".join(islice(lines, LINES_AT_ONCE)):
                yield tokenizer.encode(text, add_special_tokens=False)
        return
    yield from read_rows(path, partial(_encode_row, tokenizer=tokenizer), [])


def _encode_row(row: Row, tokenizer: Any) -> list[int]:
    messages = row.messages or [{"role": "user", "content": turn} for turn in row.turns]
    if messages and getattr(tokenizer, "chat_template", None):
        with suppress(Exception):  # a template may refuse a role or their order; their text still counts
            return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
    text = row.text or "\n".join(message["content"] for message in messages)
    return list(tokenizer.encode(text, add_special_tokens=False))
