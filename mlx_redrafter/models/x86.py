"""What a view (``hooks.py``) computes otherwise on an x86 processor, where MLX runs plain loops.

There each operation takes 5 microseconds besides what it computes, and an exponential 12 ns, three times as
long as a power. So attention and feed-forward layers whose code is Llama's, as many models' is, are computed
in fewer operations and with powers of e: the same numbers but for rounding.
"""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.models.base import scaled_dot_product_attention

from .hooks import Tape


def quicken(view: nn.Module, tape: Tape) -> None:
    """Let the modules of a view compute so, where their code is known."""
    for module in view.modules():
        quick = KNOWN.get(_code(type(module)))
        if quick is not None:
            module.__class__ = type(type(module).__name__, (quick, type(module)), {"tape": tape})


def _code(kind: type) -> Any:
    """What tells what a class computes when it is called: code, and the functions that it uses by name."""
    call: Any = vars(kind).get("__call__")
    code = getattr(call, "__code__", None)
    used = tuple(id(call.__globals__.get(name)) for name in code.co_names) if code else ()
    return code and (code.co_code, code.co_consts, code.co_varnames, code.co_names, used)


class Attention(nn.Module):
    """Llama's: queries and keys are turned together."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        if cache is None or x.dtype != mx.float32:
            return super().__call__(x, mask, cache)
        (batch, count, _), heads, own = x.shape, self.n_heads, self.n_kv_heads
        rows = x.reshape(batch * count, -1)
        both = mx.concatenate([self.q_proj(rows), self.k_proj(rows)], axis=-1)
        both = both.reshape(batch, count, heads + own, -1).transpose(0, 2, 1, 3)  # [B, Hq + Hkv, N, Dh]
        both, values = self.rope(both, offset=cache.offset), self.v_proj(rows)
        queries, values = both[:, :heads], values.reshape(batch, count, own, -1).transpose(0, 2, 1, 3)
        keys, values = cache.update_and_fetch(both[:, heads:], values)
        if isinstance(keys, mx.array):
            bias = self._bias(mask, (batch, own, heads // own, count, keys.shape[2]))
            found = attend(queries, keys, values, self.scale, bias)
        else:  # quantized
            found = scaled_dot_product_attention(queries, keys, values, cache, self.scale, mask)
        found = self.o_proj(found.transpose(0, 2, 1, 3).reshape(batch * count, -1))
        return found.reshape(batch, count, -1)

    def _bias(self, mask: Any, shape: tuple[int, ...]) -> Any:
        """What hides the same scores as a mask; layers share it."""
        if mask is None:
            return None
        which, (count, columns) = (mask if isinstance(mask, str) else id(mask), shape), shape[-2:]
        if which not in (known := self.tape.masks):
            causal = mx.arange(columns - count, columns)[:, None] >= mx.arange(columns)
            bias = mx.where(causal if isinstance(mask, str) else mask, 0.0, -mx.inf)
            bias = mx.broadcast_to(bias[:, :, None] if bias.ndim == 4 else bias, shape)
            known[which] = mask, bias.reshape(*shape[:2], -1, columns)
        return known[which][1]


class FeedForward(nn.Module):
    """Llama's: the gate is x / (1 + e^-x) of one product."""

    def __call__(self, x: mx.array) -> Any:
        if x.dtype != mx.float32:
            return super().__call__(x)
        gate = self.gate_proj(rows := x.reshape(-1, x.shape[-1]))
        gated = gate * self.up_proj(rows) / (1 + mx.power(1 / math.e, gate))
        return self.down_proj(gated).reshape(x.shape)


def attend(queries: mx.array, keys: mx.array, values: mx.array, scale: float, bias: Any = None) -> mx.array:
    """Attention [B, Hq, N, Dh] to [B, Hkv, T, Dh]; ``bias`` [B, Hkv, Hq / Hkv * N, T] is added to scores."""
    scores = (scale * queries).reshape(*keys.shape[:2], -1, keys.shape[-1]) @ keys.swapaxes(-1, -2)
    scores = scores if bias is None else scores + bias
    powers = mx.power(math.e, scores - scores.max(axis=-1, keepdims=True))
    return ((powers @ values) / powers.sum(axis=-1, keepdims=True)).reshape(*queries.shape[:3], -1)


KNOWN = {_code(llama.Attention): Attention, _code(llama.MLP): FeedForward}
