"""A prompt's cache in a file, as ``mlx_lm.cache_prompt`` and ``mlx_lm``'s ``save_prompt_cache`` write it."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import KVCache, QuantizedKVCache, load_prompt_cache, make_prompt_cache
from safetensors import SafetensorError, safe_open

from .base import LOAD_ERRORS


@dataclass
class PromptCache:
    """What such a file holds.

    Attributes:
        path: the file.
        layers: mlx-lm's caches.
        model: the model it was made with, as it was named then; None if the file does not say.
        tokenizer_config: options that the tokenizer had.
    """

    path: Path
    layers: list[Any]
    model: str | None = None
    tokenizer_config: dict[str, Any] = field(default_factory=dict)

    def fit(self, model: nn.Module) -> None:
        """Give the cache the model's type of numbers.

        Raises:
            ValueError: it is of a model of other sizes, or holds NaN.
        """
        fresh = make_prompt_cache(model)
        mx.eval(model(mx.array([[0]]), cache=fresh))
        misfit = len(fresh) != len(self.layers)
        for mine, wanted in zip(self.layers, fresh, strict=False):
            if type(mine) is not KVCache or type(wanted) is not KVCache:
                continue
            for name in ("keys", "values"):
                array, like = getattr(mine, name), getattr(wanted, name)
                misfit = misfit or not _alike(array, like, mine.offset)
                setattr(mine, name, array.astype(like.dtype))
        if misfit:
            raise ValueError(f"{self.path} does not fit the model: make one for it with mlx_lm.cache_prompt.")


def read_prompt_cache(path: Path, model: str | None, bits: int | None, group_size: int) -> PromptCache:
    """Read a file, to go on with a model (None: the one that the file names).

    Raises:
        ValueError: it is missing, damaged, something else, of another model, or quantized in another way than
            asked for, in which mlx-lm is as strict.
    """
    try:
        with safe_open(path, "numpy"):  # checks the header against the size of the file
            layers, metadata = load_prompt_cache(str(path), return_metadata=True)
        metadata = metadata if isinstance(metadata, dict) else {}
        options = json.loads(metadata.get("tokenizer_config", "{}"))
        if not layers or not isinstance(options, dict):
            raise ValueError("it is empty" if not layers else "its tokenizer_config is no object")
        mx.eval([layer.state for layer in layers])
    except (*LOAD_ERRORS, SafetensorError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path} is no usable prompt cache ({reason}): make one with mlx_lm.cache_prompt."
        ) from error
    cache = PromptCache(path, list(layers), metadata.get("model"), options)
    if isinstance(first := cache.layers[0], QuantizedKVCache):
        for flag, asked, found in (("bits", bits, first.bits), ("group-size", group_size, first.group_size)):
            if asked is not None and asked != found:
                raise ValueError(f"--kv-{flag} {asked} does not match the prompt cache: give {found}.")
    if model and cache.model and not same_model(model, cache.model):
        raise ValueError(
            f"--model {model} is not the model of {path}, {cache.model}: "
            "leave --model out, or make a cache for it with mlx_lm.cache_prompt."
        )
    return cache


def same_model(one: str, other: str) -> bool:
    """Whether two names mean the same folder, file or repository (one in the hub's cache included)."""
    names = []
    for name in (one, other):
        path = Path(name).expanduser()
        place = str(path.resolve()) if path.exists() else name
        snapshot = re.search(r"/models--([^/]+)/snapshots/[^/]+$", place)
        names.append(snapshot[1].replace("--", "/", 1) if snapshot else place)
    return names[0] == names[1]


def _alike(array: mx.array, like: mx.array, rows: int) -> bool:
    """Whether an array [1, Hkv, C, Dh] with valid ``rows`` may stand for one that is ``like`` it."""
    if array.ndim != 4 or not 0 < rows <= array.shape[2]:
        return False
    same = (array.shape[:2], array.shape[3]) == (like.shape[:2], like.shape[3])
    return same and bool(mx.isfinite(array).all().item())
