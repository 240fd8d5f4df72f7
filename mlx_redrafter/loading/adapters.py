"""LoRA adapters of mlx-lm's."""

import json
import os
from pathlib import Path

from mlx import nn
from mlx_lm.utils import load_adapters

from .base import LOAD_ERRORS


def apply_adapters(model: nn.Module, adapter_path: str) -> nn.Module:
    """The model with the adapters of a folder; ``ValueError`` if they are not mlx-lm's or do not fit."""
    folder = Path(os.path.expanduser(adapter_path))
    try:
        if "peft_type" in json.loads((folder / "adapter_config.json").read_text("utf-8")):
            raise ValueError("it is PEFT's: merge it into its model with PEFT's merge_and_unload")
        model = load_adapters(model, str(folder))
    except LOAD_ERRORS as error:
        raise ValueError(
            f"the adapter {adapter_path} does not fit ({error}): name one that mlx_lm.lora made for it."
        ) from error
    model.eval()
    return model
