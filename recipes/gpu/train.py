"""The drafter in PyTorch, its training on whole rows, and its acceptance by walks over greedy text.

The network is ``mlx_redrafter.models.drafter``'s, tensor for tensor; ``mode`` makes the
variants that were compared.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from base import Base
from torch import nn

DEPTHS = 5


@dataclass(frozen=True)
class Sizes:
    hidden: int
    context: int  # F
    exit: int
    blocks: int
    vocabulary: int
    cell: str = "simple"
    memory_heads: int = 4
    memory_head_size: int = 64
    mode: str = "depth"  # none; depth: every depth queries; once: the context does, before the first


class Drafter(nn.Module):
    """Parameters have their names on disk."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.s = s
        gates = 3 if s.cell == "gru" else 1
        self.rnn_w = nn.Linear(s.hidden, gates * s.hidden, bias=False)
        self.rnn_u = nn.Linear(s.hidden, gates * s.hidden)
        self.input_proj = nn.Linear(s.context + s.hidden, s.exit)
        blocks = [nn.ModuleDict({"linear": nn.Linear(s.exit, s.exit)}) for _ in range(s.blocks)]
        self.lm_head = nn.ModuleList([*blocks, nn.Linear(s.exit, s.vocabulary, bias=False)])
        if s.mode != "none":
            wide = s.memory_heads * s.memory_head_size
            self.memory_kv = nn.Linear(s.exit + s.hidden, 2 * wide, bias=False)
            self.memory_q = nn.Linear(s.exit, wide, bias=False)
            self.memory_out = nn.Linear(wide, s.exit, bias=False)
            self.memory_q_norm = nn.ParameterDict(
                {"weight": nn.Parameter(torch.full((s.memory_head_size,), 2.0))}
            )
            self.memory_decay = nn.Parameter(torch.full((s.memory_heads,), math.log(math.expm1(0.5))))
            self.memory_sink = nn.Parameter(torch.zeros(s.memory_heads))
            nn.init.zeros_(self.memory_out.weight)

    def read(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.rnn_w(embedding)

    def update(self, new: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        old, size = self.rnn_u(state), self.s.hidden
        if self.s.cell == "simple":
            return F.silu(new + old)
        gates = torch.sigmoid(new[..., : 2 * size] + old[..., : 2 * size])
        z, r = gates[..., :size], gates[..., size:]
        candidate = F.silu(new[..., 2 * size :] + r * old[..., 2 * size :])
        return candidate + z * (state - candidate)

    def context(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(features, self.input_proj.weight[:, : self.s.context], self.input_proj.bias)

    def of_state(self, state: torch.Tensor) -> torch.Tensor:
        return F.linear(state, self.input_proj.weight[:, self.s.context :])

    def entries(self, p: torch.Tensor, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, M, T, Dh] of rows [B, T]."""
        kv = self.memory_kv(torch.cat([p, embedding], dim=-1))
        kv = kv.unflatten(-1, (2, self.s.memory_heads, -1)).permute(2, 0, 3, 1, 4)
        return F.rms_norm(kv[0], kv.shape[-1:], eps=1e-5), kv[1]

    def attend(
        self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, distance: torch.Tensor
    ) -> torch.Tensor:
        """x [B, S, n, E] of S places, n queries at each; distance [S, T], negative where not visible.

        Returns what is added to x.
        """
        b, s, _, _ = x.shape
        heads, dh = self.s.memory_heads, self.s.memory_head_size
        q = self.memory_q(x).unflatten(-1, (heads, dh))
        q = F.rms_norm(q, (dh,), self.memory_q_norm["weight"].to(q.dtype), 1e-5)
        q = q.permute(0, 3, 2, 1, 4).flatten(2, 3)  # [B, M, n * S, Dh]
        bias = -F.softplus(self.memory_decay.float())[:, None, None] * torch.log1p(
            distance.clamp(min=0).float()
        )
        bias = bias.masked_fill(distance < 0, -1e9).to(q.dtype)  # [M, S, T]
        sink = self.memory_sink.to(q.dtype)[None, :, None, None].expand(b, heads, s, 1)
        bias = torch.cat([bias[None].expand(b, -1, -1, -1), sink], dim=-1)
        pad = keys.new_zeros(b, heads, 1, dh)
        keys, values = torch.cat([keys, pad], dim=2), torch.cat([values, pad], dim=2)
        total = -(-keys.shape[2] // 8) * 8  # the kernels want multiples of 8
        extra = total - keys.shape[2]
        keys, values = F.pad(keys, (0, 0, 0, extra)), F.pad(values, (0, 0, 0, extra))
        bias = F.pad(bias, (0, extra), value=-1e9)
        out = []
        for part in q.split(s, dim=2):
            out.append(F.scaled_dot_product_attention(part, keys, values, attn_mask=bias))
        a = torch.stack(out, dim=3)  # [B, M, S, n, Dh]
        return self.memory_out(a.permute(0, 2, 3, 1, 4).flatten(3))

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.lm_head[:-1]:
            x = x + F.silu(block["linear"](x))
        return x


class SoftCE(torch.autograd.Function):
    """The sum of -weight · p · log softmax(x Wᵀ), whose gradients are made at once: nothing of V is kept."""

    @staticmethod
    def forward(ctx, x, w, p, weight, lk):
        logits = (x @ w.T).float()
        q = torch.softmax(logits, dim=-1)
        if lk:  # total variation, mixed in as it becomes small (LK losses, see log)
            less = q < p
            gained = q * less
            loss = ((p - q) * less).sum(-1)
            accepted = 1 - loss
            mix = torch.exp(-lk * accepted)[:, None]
            gradient = mix * (q - p) + (1 - mix) * (q * gained.sum(-1, keepdim=True) - gained)
        else:
            loss = -(p * (torch.log(q + 1e-20))).sum(-1)
            gradient = q - p
        right = logits.argmax(-1)
        gradient = (gradient * weight[:, None]).to(x.dtype)
        ctx.save_for_backward(gradient @ w, gradient.T @ x)
        ctx.mark_non_differentiable(right)
        return (loss * weight).sum(), right

    @staticmethod
    def backward(ctx, upstream, _):
        dx, dw = ctx.saved_tensors
        return dx * upstream, dw * upstream, None, None, None


@dataclass
class Vocabulary:
    places: torch.Tensor  # [Vd] draft tokens as places of the base's ids
    of_place: torch.Tensor  # [n] draft index of each place, -1

    @classmethod
    def of(cls, places: np.ndarray, base: Base) -> "Vocabulary":
        chosen = torch.from_numpy(places.astype(np.int64)).to(base.device)
        inverse = torch.full((len(base.ids),), -1, device=base.device, dtype=torch.int64)
        inverse[chosen] = torch.arange(len(chosen), device=base.device)
        return cls(chosen, inverse)


def loss_of(model, base, vocabulary, tokens, trained, decay, dropout, lk):
    """Summed weighted loss of a batch of rows [B, T], how many places counted, right first choices [L]."""
    features = base.features(tokens)
    embedding = base.embed(tokens)
    b, t = tokens.shape
    head = base.head[vocabulary.places]
    p = model.context(F.dropout(features, dropout))
    new = model.read(embedding)
    state = torch.zeros((b, t, model.s.hidden), device=tokens.device, dtype=embedding.dtype)
    label = vocabulary.of_place[tokens]  # [B, T]
    xs, masks = [], []
    mask = torch.ones((b, t), dtype=torch.bool, device=tokens.device)
    mask &= _ahead(trained, 1, False)
    for depth in range(1, DEPTHS + 1):
        state = model.update(_ahead(new, depth, 0.0), state)
        xs.append(p + model.of_state(state))
        mask = mask & _ahead(trained & (label >= 0), depth + 1, False)
        masks.append(mask)
    x = torch.stack(xs, dim=2)  # [B, T, L, E]
    if model.s.mode != "none":
        keys, values = model.entries(p if dropout == 0 else model.context(features), embedding)
        places = torch.arange(t, device=tokens.device)
        distance = places[:, None] - places
        if model.s.mode == "depth":
            x = x + model.attend(x, keys, values, distance)
        else:
            x = x + model.attend(p[:, :, None], keys, values, distance)
    total, count, hits = 0.0, None, []
    rows = model.lm_head[-1].weight
    for depth in range(1, DEPTHS + 1):
        chosen = masks[depth - 1].flatten().nonzero()[:, 0]
        count = len(chosen) if count is None else count
        shifted = (chosen + depth).clamp(max=b * t - 1)  # masked where the row ends
        with torch.no_grad():
            teacher = torch.softmax(
                (features[..., : model.s.hidden].flatten(0, 1)[shifted] @ head.T).float(), -1
            )
        y = F.dropout(model.trunk(x[:, :, depth - 1].flatten(0, 1)[chosen]), dropout)
        weight = torch.full((len(chosen),), decay ** (depth - 1), device=tokens.device)
        value, right = SoftCE.apply(y, rows.to(y.dtype), teacher, weight, lk)
        total = total + value
        hits.append((right == label.flatten()[shifted + 1]).float().mean())
    return total, count, torch.stack(hits)


def _ahead(x: torch.Tensor, by: int, fill) -> torch.Tensor:
    """[B, T, ...] moved ``by`` places to the left."""
    pad = torch.full_like(x[:, :by], fill)
    return torch.cat([x[:, by:], pad], dim=1)


def train(
    model, base, vocabulary, batches, seconds, steps, *, rate=1e-3, decay=0.8, dropout=0.1, lk=0.0, say=print
):
    """Train until the time or the steps are up; the rate falls to nothing by whichever is nearer.

    Args:
        batches: gives places [B, T] and trained [B, T] of NumPy, endlessly.
    """
    decayed = [x for x in model.parameters() if x.ndim > 1]
    others = [x for x in model.parameters() if x.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=base.device != "cpu")
    begun, step, seen, recent, told = time.time(), 0, 0, [], time.time()
    while True:
        share = max((time.time() - begun) / seconds, step / steps)
        if share >= 1:
            break
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        tokens, trained = next(batches)
        tokens = torch.from_numpy(tokens.astype(np.int64)).to(base.device, non_blocking=True)
        trained = torch.from_numpy(trained).to(base.device, non_blocking=True)
        with torch.autocast(base.device, dtype=torch.bfloat16):
            total, count, hits = loss_of(model, base, vocabulary, tokens, trained, decay, dropout, lk)
        (total / max(count, 1)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen, step = seen + count, step + 1
        recent.append(torch.cat([(total / max(count, 1)).detach()[None], hits]))
        if time.time() - told > 10:
            told, mean = time.time(), torch.stack(recent[-100:]).mean(0).tolist()
            say(
                f"{time.time() - begun:.0f} s, step {step}, {seen / 1e6:.1f} M: "
                + " ".join(f"{x:.3f}" for x in mean)
            )
    return {"steps": step, "positions": seen, "seconds": round(time.time() - begun)}


@torch.no_grad()
def acceptance(model, base, vocabulary, rows, width=4, depths=DEPTHS):
    """Tokens per step on texts whose greedy continuation is known: as a chain of 4, and as beams.

    Args:
        rows: (places [T], answer's first place) of each text.

    Returns:
        per text, emitted tokens and steps of the chain and of the beams.
    """
    results = []
    with torch.autocast(base.device, dtype=torch.bfloat16):
        for tokens, first in rows:
            tokens = torch.from_numpy(tokens.astype(np.int64)).to(base.device)
            matches = [
                _matches(model, base, vocabulary, tokens, first, *shape)
                for shape in ((1, 4), (width, depths))
            ]
            counts = []
            for lengths in matches:
                # The token at ``first`` comes with the prompt; what follows it is drafted for.
                at, steps, last = first, 0, len(tokens) - 1
                while at < last:
                    at, steps = at + lengths[at - first] + 1, steps + 1
                counts += [min(at, last) - first, steps]
            results.append(counts)
    return results


def _matches(model, base, vocabulary, tokens, first, width, depths):
    """For every token of an answer: how many of the following ones the best beam has, a list."""
    features, embedding = base.features(tokens[None])[0], base.embed(tokens)
    p = model.context(features)
    places = torch.arange(
        first - 1, len(tokens) - 1, device=tokens.device
    )  # the last place the model has read
    n = len(places)
    if model.s.mode != "none":
        keys, values = model.entries(p[None], embedding[None])
        distance = places[:, None] - torch.arange(len(tokens), device=tokens.device)
        once = (
            model.attend(p[None, places][:, :, None], keys, values, distance) if model.s.mode == "once" else 0
        )
    best = torch.zeros((n, 1), device=tokens.device)
    state = model.update(model.read(embedding[places + 1]), embedding.new_zeros(n, model.s.hidden))[:, None]
    paths = torch.zeros((n, 1, 0), dtype=torch.int64, device=tokens.device)
    wanted, lengths = (
        F.pad(tokens, (0, depths + 2), value=-1),
        torch.zeros(n, dtype=torch.int64, device=tokens.device),
    )
    ahead = torch.stack([wanted[places + 2 + d] for d in range(depths)], dim=-1)  # [n, L]
    for depth in range(depths):
        x = p[places][:, None] + model.of_state(state)  # [n, W, E]
        if model.s.mode == "depth":
            x = x + model.attend(x[None], keys, values, distance)[0]
        elif model.s.mode == "once":
            x = x + once[0]
        logits = torch.log_softmax((model.trunk(x) @ model.lm_head[-1].weight.to(x.dtype).T).float(), -1)
        scores, tops = logits.topk(width, dim=-1)  # [n, W, width]
        scores = (best[..., None] + scores).flatten(1)
        best, order = scores.topk(width, dim=-1)
        parent, chosen = order // width, tops.flatten(1).gather(1, order)
        chosen = vocabulary.places[chosen]
        paths = paths.gather(1, parent[..., None].expand(-1, -1, paths.shape[2]))
        paths = torch.cat([paths, chosen[..., None]], dim=-1)
        state = state.gather(1, parent[..., None].expand(-1, -1, state.shape[2]))
        state = model.update(model.read(base.embed(chosen)), state)
        lengths += (paths == ahead[:, None, : depth + 1]).all(-1).any(-1)  # its tree has every depth's beams
    return lengths.tolist()
