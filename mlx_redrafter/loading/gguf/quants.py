"""GGUF's block formats in MLX's: exactly where MLX has the form, else the nearest."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import IQ4_NL, Q4_K, dequantize

GROUP = 32
FLOATS = {Type.F32: mx.float32, Type.F16: mx.float16, Type.BF16: mx.bfloat16}
_CHUNK = 1 << 22  # values unpacked at a time

Bytes = npt.NDArray[np.uint8]
Reals = npt.NDArray[np.float32]


def _fields(packed: Bytes, bits: int, chunk: int) -> Bytes:
    """Unpack [N, bytes] to [N, values]: runs of ``chunk`` bytes hold their lowest bits' values first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    spread: Bytes = packed.reshape(len(packed), -1, 1, chunk) >> shifts & np.uint8((1 << bits) - 1)
    return spread.reshape(len(packed), -1)


def _half(blocks: Bytes, start: int) -> Reals:
    """The float16 at byte ``start`` of each block: [N, 1]."""
    half: Reals = blocks[:, start : start + 2].copy().view(np.float16).astype(np.float32)
    return half


def _k_scales(blocks: Bytes) -> tuple[Reals, Reals]:
    """The scales and biases of the 8 groups of Q4_K and Q5_K."""
    scales, minimums = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    return _half(blocks, 0) * scales, _half(blocks, 2) * minimums * np.float32(-1)


def _iq4_xs_scales(blocks: Bytes) -> Reals:
    high = blocks[:, 2:4].copy().view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = blocks[:, 4:8, None] >> np.array([0, 4], np.uint8) & 15
    scales: Reals = (low.reshape(-1, 8) | high << 4).astype(np.float32) - 32
    return _half(blocks, 0) * scales


def _q3_k_scales(blocks: Bytes) -> Reals:
    low, high = _fields(blocks[:, 96:104], 4, 8), _fields(blocks[:, 104:108], 2, 4)
    return _half(blocks, 108) * ((low | high << 4).astype(np.float32) - 32)


_IQ4 = (np.array(IQ4_NL.kvalues) + 128).astype(np.uint8)

Unpack = Callable[[Bytes], npt.NDArray[Any]]  # blocks [N, bytes] -> uint8 [N, values]
Scales = Callable[[Bytes], tuple[Reals, Reals] | Reals]  # blocks -> scales and biases, each [N, groups]


@dataclass(frozen=True)
class Form:
    """How a GGUF type becomes ``bits`` wide affine groups of 32: value = scale * q + bias.

    ``scales`` may give the scale alone, the bias is then scale * -zero. Groups of 16 (``halves``) have no
    such form in MLX: each two are fitted by a common scale. ``rounded``: the scales are products that
    float16 may not hold.
    """

    bits: int
    values: Unpack
    scales: Scales
    zero: int = 0
    halves: bool = False
    rounded: bool = False


FORMS = {
    Type.Q4_0: Form(4, lambda b: _fields(b[:, 2:], 4, 16), lambda b: _half(b, 0), 8),
    Type.Q4_1: Form(4, lambda b: _fields(b[:, 4:], 4, 16), lambda b: (_half(b, 0), _half(b, 2))),
    Type.Q5_0: Form(
        5, lambda b: _fields(b[:, 6:], 4, 16) | _fields(b[:, 2:6], 1, 1) << 4, lambda b: _half(b, 0), 16
    ),
    Type.Q5_1: Form(
        5,
        lambda b: _fields(b[:, 8:], 4, 16) | _fields(b[:, 4:8], 1, 1) << 4,
        lambda b: (_half(b, 0), _half(b, 2)),
    ),
    Type.Q8_0: Form(8, lambda b: b[:, 2:] ^ 0x80, lambda b: _half(b, 0), 128),  # two's complement + 128
    Type.IQ4_NL: Form(8, lambda b: _IQ4[_fields(b[:, 2:], 4, 16)], lambda b: _half(b, 0), 128),
    Type.IQ4_XS: Form(8, lambda b: _IQ4[_fields(b[:, 8:], 4, 16)], _iq4_xs_scales, 128, rounded=True),
    Type.Q4_K: Form(4, lambda b: _fields(b[:, 16:], 4, 32), _k_scales, rounded=True),
    Type.Q5_K: Form(
        5, lambda b: _fields(b[:, 48:], 4, 32) | _fields(b[:, 16:48], 1, 32) << 4, _k_scales, rounded=True
    ),
    Type.Q2_K: Form(
        4,
        lambda b: _fields(b[:, 16:80], 2, 32),
        lambda b: (_half(b, 80) * (b[:, :16] & 15), _half(b, 82) * (b[:, :16] >> 4) * np.float32(-1)),
        halves=True,
    ),
    Type.Q3_K: Form(
        4,
        lambda b: _fields(b[:, 32:96], 2, 32) | _fields(b[:, :32], 1, 32) << 2,
        _q3_k_scales,
        4,
        halves=True,
    ),
    Type.Q6_K: Form(
        8,
        lambda b: _fields(b[:, :128], 4, 64) | _fields(b[:, 128:192], 2, 32) << 4,
        lambda b: _half(b, 208) * b[:, 192:208].view(np.int8),
        32,
        halves=True,
    ),
}
SUPPORTED = (*FLOATS, *FORMS, Type.MXFP4)


def quantization_of(kind: Type, quant: str) -> dict[str, Any] | None:
    """Return mlx-lm's entry for a tensor of this type, None if it is stored in floats.

    Args:
        quant: "nearest"; "keep", which makes floats of what MLX has no exact form for; or "float".
    """
    if quant != "float" and kind == Type.MXFP4:
        return {"group_size": GROUP, "bits": 4, "mode": "mxfp4"}
    if quant == "float" or kind not in FORMS or (quant == "keep" and FORMS[kind].halves):
        return None
    return {"group_size": GROUP, "bits": FORMS[kind].bits, "mode": "affine"}


def is_exact(kind: Type) -> bool:
    """Whether MLX holds the type's values with scales in float16."""
    return kind not in FORMS or not (FORMS[kind].halves or FORMS[kind].rounded)


def quantized(rows: Bytes, kind: Type, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Turn rows of blocks into MLX's ``weight``, ``scales`` and (but for MXFP4) ``biases``.

    Scales and biases are rounded to ``dtype``, and to float32 where they do not fit it.

    Args:
        rows: [N, bytes per row] of M values.

    Returns:
        weight: [N, M * bits / 32] uint32, the first value in the lowest bits. scales, biases: [N, M / 32].
    """
    if kind == Type.MXFP4:
        weight, scales = _by_chunks(rows, kind, _mxfp4)
        return {"weight": mx.array(weight), "scales": mx.array(scales)}
    weight, scales, biases = _by_chunks(rows, kind, lambda chunk: _affine(chunk, kind, dtype))
    if not (_fits(scales, dtype) and _fits(biases, dtype)):
        dtype = mx.float32
    return {
        "weight": mx.array(weight),
        "scales": mx.array(scales).astype(dtype),
        "biases": mx.array(biases).astype(dtype),
    }


def floats(rows: Bytes, kind: Type) -> mx.array:
    """Return the values of rows of any supported type: float32, or the float type they have."""
    if kind in FLOATS:
        return mx.array(rows).view(FLOATS[kind])
    return mx.array(_by_chunks(rows, kind, lambda chunk: (dequantize(chunk, kind),))[0])


def error_of(rows: Bytes, kind: Type, dtype: mx.Dtype) -> tuple[float, float]:
    """Return the squared error of MLX's form against the values meant, and the sum of their squares.

    Measured on 16 rows.
    """
    some = rows[:: max(1, len(rows) // 16)][:16]
    weight, scales, biases = quantized(some, kind, dtype).values()
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    values = mx.dequantize(weight, scales, biases, group_size=GROUP, bits=FORMS[kind].bits)
    meant = dequantize(some, kind).astype(np.float64)
    return float(((np.array(values) - meant) ** 2).sum()), float((meant**2).sum())


def _fits(values: Reals, dtype: mx.Dtype) -> bool:
    """Whether the largest of the values keeps the dtype's precision: no overflow, no denormals."""
    with np.errstate(invalid="ignore"):  # a NaN is reported later
        error = np.abs(np.array(mx.array(values).astype(dtype).astype(mx.float32)) - values).max()
        return bool(error <= mx.finfo(dtype).eps * np.abs(values).max())


def _by_chunks(
    rows: Bytes, kind: Type, unpack: Callable[[Bytes], tuple[npt.NDArray[Any], ...]]
) -> list[npt.NDArray[Any]]:
    """Return what ``unpack`` makes of all rows; what it needs besides is for some of them at a time."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    step = max(1, _CHUNK * block_bytes // block // rows.shape[1])
    whole: list[npt.NDArray[Any]] = []
    for start in range(0, len(rows), step):
        parts = unpack(rows[start : start + step])
        whole = whole or [np.empty((len(rows), part.shape[1]), part.dtype) for part in parts]
        for array, part in zip(whole, parts, strict=True):
            array[start : start + step] = part
    return whole


def _mxfp4(rows: Bytes) -> tuple[npt.NDArray[np.uint32], Bytes]:
    """Return codes packed and exponents of some rows; MLX's codes mean the same values."""
    blocks = rows.reshape(-1, 17)
    codes = _fields(blocks[:, 1:], 4, 16)
    return _pack(codes.reshape(len(rows), -1), 4), blocks[:, 0].reshape(len(rows), -1)


def _affine(rows: Bytes, kind: Type, dtype: mx.Dtype) -> tuple[npt.NDArray[np.uint32], Reals, Reals]:
    """Return codes packed, scales and biases of some rows."""
    form = FORMS[kind]
    blocks = rows.reshape(-1, GGML_QUANT_SIZES[kind][1])
    with np.errstate(invalid="ignore"):  # a NaN is reported later
        scales = form.scales(blocks)
        scales, biases = scales if isinstance(scales, tuple) else (scales, scales * np.float32(-form.zero))
        values = form.values(blocks)
        if form.halves:
            values, scales, biases = _fit_halves(values, scales, biases, form, dtype)
    return (
        _pack(values.reshape(len(rows), -1), form.bits),
        scales.reshape(len(rows), -1),
        biases.reshape(len(rows), -1),
    )


def _fit_halves(
    values: Bytes, scales: Reals, biases: Reals, form: Form, dtype: mx.Dtype
) -> tuple[Bytes, Reals, Reals]:
    """Fit each two groups of 16 by one of 32.

    Symmetric ones take a fraction of the larger scale, so that this half is exact but for rounding the
    scale (its values are all multiples) and the other one is rounded. Others take the range of both.
    """
    meant = values.reshape(-1, 2, 16) * scales.reshape(-1, 2, 1) + biases.reshape(-1, 2, 1)  # [G, 2, 16]
    meant = meant.reshape(-1, GROUP)
    top = (1 << form.bits) - 1
    if form.zero:
        pairs = scales.reshape(-1, 2)
        larger = np.take_along_axis(pairs, np.abs(pairs).argmax(-1)[:, None], -1)  # [G, 1]
        scale = larger * np.float32(2 * form.zero / (top + 1))
        bias = scale * np.float32(-(top + 1) / 2)
    else:
        bias = meant.min(-1, keepdims=True)
        scale = (meant.max(-1, keepdims=True) - bias) / np.float32(top)
    if dtype != mx.float32:  # the codes suit the scale as it will be stored
        scale, bias = (np.array(mx.array(part).astype(dtype).astype(mx.float32)) for part in (scale, bias))
    with np.errstate(divide="ignore"):
        codes = np.where(scale == 0, 0, (meant - bias) / scale)
    return np.rint(np.clip(codes, 0, top)).astype(np.uint8), scale, bias


def _pack(values: Bytes, bits: int) -> npt.NDArray[np.uint32]:
    """Pack [N, M] values as MLX does: a stream of bits, the first value in the lowest."""
    count = 8 if bits == 5 else 8 // bits  # of values that fill whole bytes
    groups = values.reshape(len(values), -1, count)
    if bits == 5:
        stream = np.zeros(groups.shape[:2], np.uint64)
        for i in range(count):
            stream |= groups[..., i].astype(np.uint64) << np.uint64(bits * i)
        packed = stream[..., None].view(np.uint8)[..., :bits]  # little-endian
    else:
        packed = np.zeros(groups.shape[:2], np.uint8)
        for i in range(count):
            packed |= groups[..., i] << np.uint8(bits * i)
    return np.ascontiguousarray(packed).reshape(len(values), -1).view(np.uint32)
