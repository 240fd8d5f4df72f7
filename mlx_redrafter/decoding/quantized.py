"""Keys and values that are quantized, as mlx-lm does. Few texts have any."""

from typing import Any

import mlx.core as mx

from .layers import Layers, Quantization, commit, one_text
from .state import PER_TEXT, State


def quantize(state: State, text: int, how: Quantization) -> State:
    """The committed state of one text, by number, quantized; the given one stays as it is."""
    per_text: dict[str, Any] = {
        name: getattr(state, name)[text : text + 1] for name in (*PER_TEXT, "history")
    }
    return State(**per_text, layers=quantized(one_text(commit(state.layers), text), how))


def quantized(layers: Layers, how: Quantization) -> Layers:
    """The committed layers with keys and values quantized, in place of the given ones, one at a time."""
    for number, rows in enumerate(layers.rows[:-1] if layers.memory else layers.rows):
        layers.rows[number] = [part for array in rows for part in quantized_rows(array, how)]
        mx.eval(layers.rows[number])
    return layers


def quantized_rows(rows: mx.array, how: Quantization) -> list[mx.array]:
    """Rows [B, Hkv, n, Dh] packed, their scales and their biases, each [B, Hkv, n, ...]."""
    return list(mx.quantize(rows, group_size=how.group_size, bits=how.bits))


def quantization_of(packed: mx.array, scales: mx.array, size: int) -> Quantization:
    """How rows of ``size`` numbers are quantized. Their widths tell: compiled steps are given arrays only."""
    return Quantization(32 * packed.shape[-1] // size, size // scales.shape[-1])
