"""A base model (Llama or Qwen2) in PyTorch: for many conversations at once on one GPU.

It reads the tensors of a GGUF file as ``pack.py`` cut them, and gives what a drafter reads, as
``mlx_redrafter.models.target`` does: the last hidden state, then RMS-normalised layer outputs.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

RMS_EPS = 1e-6  # of the layers' outputs, as in target.py


def read(folder: Path, device: str, dtype: torch.dtype) -> tuple[dict, dict[str, torch.Tensor]]:
    """The sizes, and every tensor by its GGUF name, of what ``pack.py`` wrote."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    index = json.loads((folder / "index.json").read_text())
    raw = np.memmap(folder / "tensors.bin", np.uint8, "r")

    def one(entry: dict) -> tuple[str, torch.Tensor]:
        part = raw[entry["at"] : entry["at"] + entry["bytes"]].reshape(entry["byte_shape"])
        kind = GGMLQuantizationType(entry["type"])
        part = np.array(part)
        values = part.view(np.float32) if entry["type"] == 0 else dequantize(part, kind)
        return entry["name"], torch.from_numpy(np.ascontiguousarray(values)).to(device, dtype)

    with ThreadPoolExecutor(8) as pool:
        return index["sizes"], dict(pool.map(one, index["tensors"]))


class Base:
    """The model.

    Attributes:
        ids: [n] the token ids whose rows the embedding and the head have; other tokens cannot be read.
    """

    def __init__(
        self, folder: Path, context_layers: tuple[int, ...], device: str, dtype: torch.dtype
    ) -> None:
        sizes, w = read(folder, device, dtype)
        self.sizes, self.context_layers, self.device, self.dtype = sizes, context_layers, device, dtype
        self.heads, self.kv_heads, self.eps = sizes["heads"], sizes["kv_heads"], sizes["eps"]
        self.hidden = sizes["hidden"]
        self.dh = self.hidden // self.heads
        ids = np.load(folder / "ids.npy")
        self.ids = torch.from_numpy(ids.astype(np.int64)).to(device)
        self.embedding = w["token_embd.weight"]  # [n, H]
        self.head = w.get("output.weight", self.embedding)
        self.norm = w["output_norm.weight"]
        self.layers = []
        for i in range(sizes["layers"]):
            part = {name.split(".", 2)[2]: x for name, x in w.items() if name.startswith(f"blk.{i}.")}
            q, k = part["attn_q.weight"], part["attn_k.weight"]
            if sizes["architecture"] == "llama":  # GGUF interleaves the halves that are rotated
                q, k = _halves(q, self.heads), _halves(k, self.kv_heads)
            layer = {"norm1": part["attn_norm.weight"], "norm2": part["ffn_norm.weight"]}
            layer["qkv"] = torch.cat([q, k, part["attn_v.weight"]])
            biases = [part.get(f"attn_{name}.bias") for name in "qkv"]
            layer["bias"] = None if biases[0] is None else torch.cat(biases)
            layer["o"], layer["down"] = part["attn_output.weight"], part["ffn_down.weight"]
            layer["up"] = torch.cat([part["ffn_gate.weight"], part["ffn_up.weight"]])
            self.layers.append(layer)
        places = torch.arange(8192, device=device, dtype=torch.float32)
        rates = sizes["theta"] ** (-torch.arange(0, self.dh, 2, device=device, dtype=torch.float32) / self.dh)
        angles = places[:, None] * rates
        self.cos, self.sin = angles.cos(), angles.sin()  # [8192, dh / 2]

    def embed(self, places: torch.Tensor) -> torch.Tensor:
        """Places in ``ids`` [...] -> [..., H]."""
        return F.embedding(places, self.embedding)

    def _qkv(self, layer: dict, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
        """x [B, n, H] -> q [B, heads, n, dh], k and v [B, kv_heads, n, dh], rotated."""
        y = F.linear(x, layer["qkv"], layer["bias"]).unflatten(-1, (-1, self.dh)).transpose(1, 2)
        q, k, v = y.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def _mlp(self, layer: dict, x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(_rms(x, layer["norm2"], self.eps), layer["up"]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, layer["down"])

    @torch.no_grad()
    def features(self, places: torch.Tensor, cache: "Cache | None" = None) -> torch.Tensor:
        """Whole rows [B, T] -> what a drafter reads [B, T, F]; keeps keys and values in ``cache``."""
        length = places.shape[1]
        x, kept = self.embed(places), []
        cos, sin = self.cos[:length], self.sin[:length]
        for i, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, _rms(x, layer["norm1"], self.eps), cos, sin)
            if cache is not None:
                cache.k[i][:, :, :length], cache.v[i][:, :, :length] = k, v
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + F.linear(a.transpose(1, 2).flatten(2), layer["o"])
            x = x + self._mlp(layer, x)
            if i + 1 in self.context_layers:
                kept.append(_rms(x, None, RMS_EPS))
        return torch.cat([_rms(x, self.norm, self.eps), *kept], dim=-1)

    def step(self, places: torch.Tensor, at: torch.Tensor, cache: "Cache", columns: int) -> torch.Tensor:
        """One token [B] for every row, at place ``at`` [1] of each -> logits [B, n].

        Attention reads the first ``columns`` rows of the cache, those after ``at`` masked.
        """
        x = self.embed(places)[:, None]
        cos, sin = self.cos.index_select(0, at), self.sin.index_select(0, at)
        hidden = torch.arange(columns, device=x.device) > at  # [columns]
        bias = torch.zeros(columns, device=x.device, dtype=x.dtype).masked_fill(hidden, -1e9)
        bias = bias.expand(x.shape[0], self.kv_heads, self.heads // self.kv_heads, columns)
        for i, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, _rms(x, layer["norm1"], self.eps), cos, sin)
            cache.k[i].index_copy_(2, at, k)
            cache.v[i].index_copy_(2, at, v)
            keys, values = cache.k[i][:, :, :columns], cache.v[i][:, :, :columns]
            grouped = q.reshape(q.shape[0], self.kv_heads, -1, self.dh)  # a group's heads, as if places
            a = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias)
            a = a.reshape(q.shape[0], 1, -1)
            x = x + F.linear(a, layer["o"])
            x = x + self._mlp(layer, x)
        return F.linear(_rms(x[:, 0], self.norm, self.eps), self.head)


class Cache:
    """Keys and values of B rows of up to T tokens."""

    def __init__(self, base: Base, batch: int, length: int) -> None:
        shape = len(base.layers), batch, base.kv_heads, length, base.dh
        self.k = torch.zeros(shape, device=base.device, dtype=base.dtype)
        self.v = torch.zeros_like(self.k)

    def rows(self, start: int, end: int) -> "Cache":
        """Some of the rows, in the same memory."""
        part = Cache.__new__(Cache)
        part.k, part.v = self.k[:, start:end], self.v[:, start:end]
        return part


def _rms(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) if weight is None else y.to(x.dtype) * weight


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    out, inputs = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, inputs).transpose(1, 2).reshape(out, inputs)
