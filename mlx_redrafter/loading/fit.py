"""The drafters on this machine, and which of them is for a model; of weights, only some rows are read."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..models.bundle import base_of, parse_config, read_config
from ..models.identity import BaseIdentity, digest_rows, embedding_digest, identity_of, token_embedding
from .find import shipped_drafters
from .library import Entry


@dataclass(frozen=True)
class KnownDrafter:
    """A drafter on this machine; ``base`` is None if it does not record its base model."""

    name: str
    folder: Path
    hidden_size: int
    vocab_size: int
    base: BaseIdentity | None


def known_drafters(entries: Sequence[Entry]) -> list[KnownDrafter]:
    """The drafters that ship, then those among ``entries``; damaged ones are left out."""
    named = [(folder.name, folder) for folder in shipped_drafters()]
    named += [(entry.name, entry.path) for entry in entries if entry.is_drafter and not entry.problem]
    found = []
    for name, folder in named:
        with suppress(ValueError, TypeError):
            found.append(known_drafter(name, folder))
    return found


def known_drafter(name: str, folder: Path) -> KnownDrafter:
    """What the config of the drafter in a folder says; ``ValueError`` if it is missing or damaged."""
    raw = read_config(folder)
    config = parse_config(folder, raw)
    return KnownDrafter(name, folder, config.hidden_size, config.vocab_size, base_of(raw))


def drafter_of(source: nn.Module | Path, drafters: Sequence[KnownDrafter]) -> KnownDrafter | None:
    """The first of the drafters that is for a model: recorded so or, if it records none, by its sizes.

    Args:
        source: an mlx-lm model, whose weights may still be lazy, or a GGUF file.

    Raises:
        ValueError: the GGUF file is damaged, or there is no token embedding.
    """
    sizes, rows = _embedding(source)
    same = [drafter for drafter in drafters if (drafter.hidden_size, drafter.vocab_size) == sizes]
    if not same:  # then no weights are read
        return None
    identity = identity_of(source) if isinstance(source, nn.Module) else _identity(rows)
    recorded = (drafter for drafter in same if drafter.base is not None and drafter.base.matches(identity))
    return next(recorded, next((drafter for drafter in same if drafter.base is None), None))


def _embedding(source: nn.Module | Path) -> tuple[tuple[int, int], Any]:
    """The width H and the rows V of the token embedding; and this, of a GGUF file."""
    if isinstance(source, nn.Module):
        embedding = token_embedding(source)
        if embedding is None:
            raise ValueError(f"{type(source).__name__} has no token embedding: it cannot have a drafter.")
        return (embedding(mx.array([0])).shape[-1], embedding.weight.shape[0]), None
    from .gguf.reader import skim_gguf

    tensor = skim_gguf(source).tensors.get("token_embd.weight")
    if tensor is None or len(tensor.shape) != 2:
        raise ValueError(f"{source} has no token embedding: it cannot have a drafter.")
    return (tensor.shape[1], tensor.shape[0]), tensor


def _identity(tensor: Any) -> BaseIdentity:
    """As ``identity_of``, by a GGUF's token embedding."""
    from .gguf.quants import floats

    vocab_size, hidden_size = tensor.shape
    rows = floats(tensor.rows[digest_rows(vocab_size)], tensor.type).astype(mx.float32)
    digest = embedding_digest(np.array(rows).reshape(-1, hidden_size))
    return BaseIdentity("gguf", hidden_size, vocab_size, digest)
