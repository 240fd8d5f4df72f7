"""A model is split among machines by mlx-lm, having checked that it can be done.

Its ``shard`` gives each a part of every layer; models that have only ``pipeline`` are split by layers.
"""

import copy
import hashlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from ..models.hooks import Tape, leaves, view
from .base import LOAD_ERRORS
from .find import digest
from .read import check_finite

QUERIES = ("n_heads", "num_heads", "num_attention_heads", "num_v_heads")  # of an attention layer
KEYS = ("n_kv_heads", "num_kv_heads", "num_key_value_heads", "num_k_heads")
MOST = 64  # machines


class _Part:
    """Stands in for a group of so many machines while only the shapes matter."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def split(model: nn.Module, group: mx.distributed.Group, name: str, folder: Path | None = None) -> None:
    """Read this machine's part of a model that is loaded lazily: of each tensor in turn, a part is kept.

    Raises:
        ValueError: mlx-lm cannot split such models, or not among so many machines; it names the numbers that
            would work.
    """
    shard: Any = getattr(model, "shard", None)
    inner: Any = getattr(model, "model", None)
    kind = getattr(model, "model_type", None) or type(model).__module__.rpartition(".")[-1]
    if shard is None and not hasattr(inner, "pipeline"):
        raise ValueError(
            f"{name} cannot be split: mlx-lm has neither 'shard' nor 'pipeline' for {kind} models. "
            "Run it on one machine, or take a model such as llama, qwen2 or qwen3."
        )
    size = group.size()
    if not can_split(model, size):
        usable = [str(n) for n in range(2, MOST + 1) if can_split(model, n)]
        works = f"start {' or '.join(usable)}" if usable else "run it on one machine"
        if shard is None:
            what = f"{len(inner.layers)} layers, of which {size} machines cannot have some of every kind each"
        else:
            what = "weights, or groups of quantized ones" if _shares_heads(model, size) else _heads(model)
            what += f", which {size} machines cannot share evenly"
        raise ValueError(f"{name} has {what}: {works}.")
    if shard is not None:
        shard(group)
    else:
        count = len(inner.layers)
        inner.pipeline(group)
        inner.layers += [None] * (count - len(inner.layers))  # so that each machine knows how many there are
    try:
        check_finite(folder or Path(name), dict(tree_flatten(model.parameters())))  # reads one at a time
    except RuntimeError as error:
        raise ValueError(f"the weights in {folder} cannot be read ({error}): get the model again.") from error


def fingerprint(folder: Path) -> str:
    """Of a model's config and weights (of samples of them), in short."""
    files = [folder / "config.json", *sorted(folder.glob("model*.safetensors"))]
    known = [digest(file) for file in files if file.is_file()]
    return hashlib.sha256("".join(known).encode()).hexdigest()[:12]


def can_split(model: nn.Module, size: int) -> bool:
    """Whether so many machines can share heads and weights evenly, or layers. Nothing is computed."""
    try:
        if not hasattr(model, "shard"):
            return all(_kinds(_part_of(model, size, rank)) == _kinds(model) for rank in range(size))
        if _shares_heads(model, size):
            view(model, Tape()).shard(_Part(size))
            return True
    except LOAD_ERRORS:
        pass
    return False


def _part_of(model: Any, size: int, rank: int) -> Any:
    """A twin of the model that has the layers of one machine."""
    part = copy.copy(model)
    part.model = copy.copy(model.model)
    part.model.pipeline(_Part(size, rank))
    return part


def _kinds(model: nn.Module) -> set[tuple[type, int | None]]:
    """What kinds of memory layers have: engines plan by them, and all machines' must plan alike."""
    return {(type(each), getattr(each, "max_size", None)) for each in leaves(make_prompt_cache(model))}


def _shares_heads(model: nn.Module, size: int) -> bool:
    return not any(number % size for counted in _counts(model) for number in counted.values())


def _counts(model: nn.Module) -> list[dict[str, int]]:
    """The numbers of heads of each attention layer, by name."""
    names = (*QUERIES, *KEYS)
    found = [
        {name: number for name in names if isinstance(number := getattr(module, name, None), int)}
        for _, module in model.named_modules()
    ]
    return [counts for counts in found if counts]


def _heads(model: nn.Module) -> str:
    counts = max(_counts(model), key=len, default={})
    queries = next((counts[name] for name in QUERIES if name in counts), "some")
    keys = next((f" and {counts[name]} key heads" for name in KEYS if name in counts), "")
    return f"{queries} attention heads{keys}"
