"""Writing a drafter to disk: the bundle that ``bundle.py`` reads."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..loading.files import atomic_folder
from .bundle import FORMAT, MODEL_TYPE, SECTION, check_shapes
from .drafter import DrafterConfig, Quantization
from .identity import BaseIdentity
from .stored import pack


def write_drafter(
    folder: str | Path,
    config: DrafterConfig,
    weights: Mapping[str, mx.array],
    base: BaseIdentity | None = None,
    extra: Mapping[str, Any] | None = None,
    card: str = "",
    stored: Quantization | None = None,
    others: Mapping[str, bytes] | None = None,
) -> None:
    """Write a bundle; it appears whole or not at all.

    Args:
        folder: must not exist.
        weights: by name, as ``Drafter.weights`` gives them; tensors that nothing reads may be among them.
        base: the model it belongs to, if known.
        extra: further entries of the ``mlx_redrafter`` section.
        card: the text of README.md; none is written if empty.
        stored: how linear layers are quantized on disk only: they are floats again once they are loaded.
        others: further files, by name.
    Raises:
        ValueError: a tensor is missing or has another shape, or ``folder`` exists.
        OSError: the disk is full or not writable.
    """
    unused = check_shapes(config, weights)
    section = {"format": FORMAT, "base": base and asdict(base), "unused_tensors": unused, **(extra or {})}
    if stored is not None:
        if config.quantization is not None:
            raise ValueError("the drafter is quantized already: store the one it was made from.")
        section["stored"] = asdict(stored)
        weights = dict(pack(config, weights, stored))
    raw = {"model_type": MODEL_TYPE, **config.to_dict(), SECTION: section}
    with atomic_folder(Path(folder)) as temporary:
        (temporary / "config.json").write_text(json.dumps(raw, indent=2) + "\n", "utf-8")
        mx.save_safetensors(str(temporary / "model.safetensors"), dict(weights), {"format": "mlx"})
        if card:
            (temporary / "README.md").write_text(card, "utf-8", "replace")
        for name, content in (others or {}).items():
            (temporary / name).write_bytes(content)
