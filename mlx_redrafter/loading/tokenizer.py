"""The tokenizer of a model's folder, as ``mlx_lm.load`` would load it, and where that is not enough, too."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer as mlx_load_tokenizer

from .ends import ends_of_turn, named_ends, token_text
from .read import read_object


def load_tokenizer(
    folder: Path,
    *,
    name: str = "",
    eos_token_ids: int | list[int] | None = None,
    trust_remote_code: bool = False,
    options: Mapping[str, Any] | None = None,
) -> TokenizerWrapper:
    """Load the tokenizer of a model folder as ``mlx_lm.load`` would, and where that is not enough, too.

    A folder with only ``tokenizer.model`` gets the equivalent fast tokenizer, a Vicuna without a chat
    template gets its template. Nothing is written to ``folder``: that work is done in a copy.
    Its ends of text are mlx-lm's, all that config.json names, and the end of a turn in the chat template.

    Args:
        folder: holds the tokenizer's files and, usually, ``config.json``.
        name: the model's repository id or path if that is not ``folder``; looked at for "vicuna".
        eos_token_ids: ends of generation besides the tokenizer's own, as ``config.json`` gives them.
        options: of the tokenizer, such as ``{"eos_token": "</s>"}``.

    Raises:
        ValueError: there is no tokenizer, it cannot be read, or it lacks the ``eos_token`` of ``options``.
    """
    real = folder.resolve()  # of the Hugging Face cache, the repository has the model's name
    name = name or (real.parents[1] if real.parent.name == "snapshots" else real).name
    end = str(token_text((options or {}).get("eos_token") or ""))
    if end and end not in load_tokenizer(folder, name=name, trust_remote_code=trust_remote_code).get_vocab():
        raise ValueError(f"eos_token {end!r} is not a token of {folder}: give one of its vocabulary.")
    ends = named_ends(folder, eos_token_ids)
    extra = {**(options or {}), "trust_remote_code": trust_remote_code}
    try:
        vicuna = _needs_vicuna_template(folder, name)
        only_pieces = (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists()
        if not (vicuna or only_pieces):
            return _load(folder, extra, ends)
        from .build_tokenizers import completed

        with completed(folder, vicuna) as copy:
            return _load(copy, extra, ends)
    except BaseException as error:  # the tokenizers library raises nothing more specific, or panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().split("\n")[0][:300]
        raise ValueError(f"No usable tokenizer in {folder}: {reason} Add its tokenizer.json.") from error


def _load(folder: Path, extra: dict[str, Any], ends: list[int]) -> TokenizerWrapper:
    with _muted():
        tokenizer: TokenizerWrapper = mlx_load_tokenizer(folder, extra, ends or None)
        tokenizer.encode("a")  # a damaged one may load and then fail
    largest, size = max(tokenizer.get_vocab().values()), len(tokenizer)
    if largest > 9 * size:  # the tokenizers library would write a line for each id that is left out
        raise ValueError(f"it has token {largest}, but {size} tokens.")
    tokenizer.eos_token_ids |= ends_of_turn(tokenizer)
    return tokenizer


@contextmanager
def _muted() -> Iterator[None]:
    """Keep the report of a Rust library that panics off standard error; the exception says it all."""
    try:
        saved = os.dup(2)
    except OSError:  # there is none
        yield
        return
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _needs_vicuna_template(folder: Path, name: str) -> bool:
    names = f"{Path(name).name} {read_object(folder / 'config.json', optional=True).get('_name_or_path')}"
    if "vicuna" not in names.lower():
        return False
    given = any((folder / f"chat_template.{ending}").exists() for ending in ("jinja", "json"))
    return not (given or read_object(folder / "tokenizer_config.json", optional=True).get("chat_template"))
