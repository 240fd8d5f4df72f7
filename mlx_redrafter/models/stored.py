"""Linear layers of a drafter that have fewer bits on disk than in memory."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx

from .drafter import DrafterConfig, Quantization


def stored_as(given: object, config: DrafterConfig, folder: Path) -> Quantization:
    """What ``stored`` says in the config.json of a drafter; ``ValueError`` if that cannot be."""
    try:
        if not isinstance(given, dict) or not {"bits"} <= given.keys() <= {"bits", "group_size"}:
            raise ValueError("it needs 'bits' and 'group_size'")
        if config.quantization is not None:
            raise ValueError("the drafter is quantized in memory too")
        return Quantization(**given)
    except ValueError as error:
        path = folder / "config.json"
        raise ValueError(f"{path}: 'stored' is {given!r} ({error}): convert the drafter again.") from error


def unpack(
    config: DrafterConfig, weights: Mapping[str, mx.array], how: Quantization, dtype: mx.Dtype | None = None
) -> dict[str, mx.array]:
    """The tensors with floats of a type, by default that of the scales, where there were fewer bits."""
    found = dict(weights)
    for layer in _layers(config, how):
        scales, biases = (found.pop(f"{layer}.{part}") for part in ("scales", "biases"))
        exact = scales.astype(mx.float32), biases.astype(mx.float32)
        floats = mx.dequantize(found[f"{layer}.weight"], exact[0], exact[1], how.group_size, how.bits)
        found[f"{layer}.weight"] = floats.astype(dtype or scales.dtype)
    return found


def pack(
    config: DrafterConfig, weights: Mapping[str, mx.array], how: Quantization
) -> Iterator[tuple[str, mx.array]]:
    """The tensors of a drafter with all linear layers quantized that fit, one after the other.

    Raises:
        ValueError: none fits.
    """
    names = {f"{layer}.weight" for layer in _layers(config, how)}
    if not names:
        raise ValueError(
            f"no layer's width is a multiple of the group size {how.group_size}: take a smaller one."
        )
    for name, weight in weights.items():
        if name not in names:
            yield name, weight
            continue
        parts = mx.quantize(weight, how.group_size, how.bits)
        mx.eval(parts)
        layer = name.removesuffix(".weight")
        yield from zip((name, f"{layer}.scales", f"{layer}.biases"), parts, strict=True)


def _layers(config: DrafterConfig, how: Quantization) -> list[str]:
    return [name.removesuffix(".scales") for name in config.shapes(how) if name.endswith(".scales")]
