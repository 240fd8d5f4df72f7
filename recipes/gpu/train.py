"""The drafter in PyTorch, and its training on whole rows.

The network is ``mlx_redrafter.models.drafter``'s, tensor for tensor.
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
    memory_heads: int = 4
    memory_head_size: int = 64


class Drafter(nn.Module):
    """Parameters have their names on disk."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.s = s
        self.rnn_w = nn.Linear(s.hidden, s.hidden, bias=False)
        self.rnn_u = nn.Linear(s.hidden, s.hidden)
        self.input_proj = nn.Linear(s.context + s.hidden, s.exit)
        blocks = [nn.ModuleDict({"linear": nn.Linear(s.exit, s.exit)}) for _ in range(s.blocks)]
        self.lm_head = nn.ModuleList([*blocks, nn.Linear(s.exit, s.vocabulary, bias=False)])
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
        self.rare_proj = nn.Linear(s.exit, s.hidden, bias=False)
        self.rare_bias = nn.Parameter(torch.zeros(1))

    def read(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.rnn_w(embedding)

    def update(self, new: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return F.silu(new + self.rnn_u(state))

    def context(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(features, self.input_proj.weight[:, : self.s.context], self.input_proj.bias)

    def of_state(self, state: torch.Tensor) -> torch.Tensor:
        return F.linear(state, self.input_proj.weight[:, self.s.context :])

    def entries(self, p: torch.Tensor, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, M, T, Dh] of rows [B, T]."""
        kv = self.memory_kv(torch.cat([p, embedding], dim=-1))
        keys, values = kv.unflatten(-1, (2, self.s.memory_heads, -1)).permute(2, 0, 3, 1, 4)
        return F.rms_norm(keys, keys.shape[-1:], eps=1e-5), values

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


class CrossEntropy(torch.autograd.Function):
    """The weighted sum of -p · log softmax([x Wᵀ, more]), and the rank of each label.

    Gradients are made at once.
    """

    @staticmethod
    def forward(ctx, x, w, more, teacher, label, weight, temperature):
        logits = torch.cat([x @ w.T, more.to(x.dtype)], dim=1).float()
        rank = (logits > logits.gather(1, label[:, None])).sum(1)
        logs = torch.log_softmax(logits, dim=1)
        p = torch.softmax(teacher.float() / temperature, dim=1)
        loss = -(p * logs).sum(1)
        gradient = (logs.exp_().sub_(p) * weight[:, None]).to(x.dtype)
        common, rare = gradient.split([len(w), more.shape[1]], dim=1)
        ctx.save_for_backward(common @ w, common.T @ x, rare.to(more.dtype))
        ctx.mark_non_differentiable(rank)
        return (loss * weight).sum(), rank

    @staticmethod
    def backward(ctx, upstream, _):
        return *(part * upstream for part in ctx.saved_tensors), None, None, None, None


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


@dataclass
class Rows:
    """Conversations of one length, and the rare tokens of each: those that the draft vocabulary lacks."""

    tokens: torch.Tensor  # [N, T] places in the base's ids
    trained: torch.Tensor  # [N, T] bool: the model said it
    label: torch.Tensor  # [N, T] draft index; of a rare token Vd and its number in the row; -1: neither
    rare: torch.Tensor  # [N, R] places; 0 after the last
    first: torch.Tensor  # [N, R] where each comes first; T + 2 after the last

    @classmethod
    def of(cls, tokens: np.ndarray, trained: np.ndarray, vocabulary: Vocabulary, most: int = 384) -> "Rows":
        common, label = len(vocabulary.places), vocabulary.of_place.cpu().numpy()[tokens]
        found = []
        for row, labels in zip(tokens, label, strict=True):
            at = np.flatnonzero(labels < 0)
            rare, first, number = np.unique(row[at], return_index=True, return_inverse=True)
            labels[at] = np.where(number < most, common + number, -1)
            found.append((rare[:most], at[first[:most]]))
        width = -(-max(1, *(len(rare) for rare, _ in found)) // 8) * 8
        rare = np.zeros((len(tokens), width), np.int64)
        first = np.full((len(tokens), width), tokens.shape[1] + 2)
        for i, (r, f) in enumerate(found):
            rare[i, : len(r)], first[i, : len(f)] = r, f
        device = vocabulary.places.device
        arrays = tokens.astype(np.int64), trained, label, rare, first
        return cls(*(torch.from_numpy(x).to(device) for x in arrays))

    def __getitem__(self, some: torch.Tensor) -> "Rows":
        part = [x[some] for x in (self.tokens, self.trained, self.label, self.rare, self.first)]
        width = max(8, -(-int((part[4] < self.tokens.shape[1]).sum(1).max()) // 8) * 8)
        return Rows(*part[:3], part[3][:, :width], part[4][:, :width])

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class How:
    """How is trained."""

    rate: float = 1e-3
    temperature: float = 0.85  # of the labels
    decay: float = 0.85  # places of a depth that the next one trains
    reached: float = 0.3  # of the weight: only for depths that the first three choices would have led to
    dropout: float = 0.05


def loss_of(model, base, vocabulary, rows: Rows, features, how: How):
    """Summed weighted loss of rows [B, T], how many places counted, right first choices [L]."""
    tokens, (b, t), common = rows.tokens, rows.tokens.shape, len(vocabulary.places)
    places = torch.arange(t, device=tokens.device)
    number = (rows.label - common).clamp(min=0, max=rows.first.shape[1] - 1)
    own_first = torch.where(rows.label >= common, rows.first.gather(1, number), -1)
    mask, chosen = _ahead(rows.trained, 1, False), []
    for depth in range(1, DEPTHS + 1):  # before the rest: the host waits for it
        mask = mask & _ahead(rows.trained & (rows.label >= 0), depth + 1, False)
        mask = mask & (_ahead(own_first, depth + 1, t + 2) <= places + 1)
        if depth > 1:
            mask = mask & (torch.rand(b, t, device=tokens.device) < how.decay)
        chosen.append(mask.flatten().nonzero()[:, 0])
    embedding, e = base.embed(tokens), base.embed(rows.rare).transpose(1, 2)  # [B, H, R]
    unseen = rows.first[:, None] > places[:, None] + 1  # [B, T, R]
    hidden = features[..., : model.s.hidden]
    teacher = (hidden @ base.head[vocabulary.places].T).flatten(0, 1)
    rare_teacher = (hidden @ e).flatten(0, 1)
    p = model.context(F.dropout(features, how.dropout))
    new, state, xs = model.read(embedding), torch.zeros_like(embedding), []
    for depth in range(1, DEPTHS + 1):
        state = model.update(_ahead(new, depth, 0.0), state)
        xs.append(p + model.of_state(state))
    x = torch.stack(xs, dim=2)  # [B, T, L, E]
    keys, values = model.entries(model.context(features), embedding)
    x = x + model.attend(x, keys, values, places[:, None] - places)
    total, hits, alive = 0.0, [], torch.ones(b * t, device=tokens.device)
    unseen = unseen.flatten(0, 1)
    for depth, here in enumerate(chosen, 1):
        y = F.dropout(model.trunk(x[:, :, depth - 1]), how.dropout)
        more = (model.rare_proj(y) @ e + model.rare_bias.to(y.dtype)).flatten(0, 1)[here]
        hide, shifted = unseen[here], here + depth
        value, rank = CrossEntropy.apply(
            y.flatten(0, 1)[here],
            model.lm_head[-1].weight.to(y.dtype),
            more.masked_fill(hide, -1e9),
            torch.cat([teacher[shifted], rare_teacher[shifted].masked_fill(hide, -1e9)], dim=1),
            rows.label.flatten()[shifted + 1],
            1 - how.reached + how.reached * alive[here],
            how.temperature,
        )
        total = total + value
        hits.append((rank == 0).float().mean())
        alive = alive * torch.zeros_like(alive).index_put((here,), (rank < 3).float())
    return total, len(chosen[0]), torch.stack(hits)


def with_rare(tensors: dict, base: Base, vocabulary: Vocabulary, blocks: int | None = None) -> Drafter:
    """The network of a drafter's tensors; ``blocks`` may be more than it has: the new ones begin as nothing.

    Without a map to rare tokens it begins as the head's rows would be, were they a map of embeddings.
    """
    tensors = {name: x.float() for name, x in tensors.items() if name != "draft_to_target"}
    exit_dim, inputs = tensors["input_proj.weight"].shape
    heads, head_size = len(tensors["memory_sink"]), len(tensors["memory_q_norm.weight"])
    had = sum(name.endswith(".linear.bias") for name in tensors)
    blocks = blocks or had
    tensors[f"lm_head.{blocks}.weight"] = tensors.pop(f"lm_head.{had}.weight")
    for i in range(had, blocks):
        tensors[f"lm_head.{i}.linear.weight"] = torch.zeros(exit_dim, exit_dim)
        tensors[f"lm_head.{i}.linear.bias"] = torch.zeros(exit_dim)
    common = len(vocabulary.places)
    sizes = Sizes(base.hidden, inputs - base.hidden, exit_dim, blocks, common, heads, head_size)
    model = Drafter(sizes)
    if "rare_bias" not in tensors:
        known = base.embedding[vocabulary.places].float().cpu()
        square = known.T @ known
        ridge = 1e-3 * square.diagonal().mean() * torch.eye(len(square))
        rows = tensors[f"lm_head.{blocks}.weight"].cpu()
        tensors["rare_proj.weight"] = torch.linalg.solve(square + ridge, known.T @ rows)
        tensors["rare_bias"] = torch.zeros(1)
    model.load_state_dict(tensors)
    model.memory_decay.requires_grad_(False)  # rows of training are short, texts are not
    return model.to(base.device)


def _ahead(x: torch.Tensor, by: int, fill) -> torch.Tensor:
    """[B, T, ...] moved ``by`` places to the left."""
    pad = torch.full_like(x[:, :by], fill)
    return torch.cat([x[:, by:], pad], dim=1)


def groups_of(model: Drafter) -> tuple[list[dict], list[float]]:
    """Parameters by their decay, and by what the rate is multiplied with."""
    kinds: dict[tuple[float, float], list] = {}
    for name, x in model.named_parameters():
        rare = name.startswith("rare")
        kind = ((25.0 if x.ndim == 1 else 2.0) if rare else 1.0, 0.01 if x.ndim > 1 and not rare else 0.0)
        if x.requires_grad:
            kinds.setdefault(kind, []).append(x)
    return [{"params": x, "weight_decay": d} for (_, d), x in kinds.items()], [factor for factor, _ in kinds]


def train(model, base, vocabulary, batches, held, share_of, how: How, *, save, say=print, every=60) -> dict:
    """Train until ``share_of()`` is 1; the rate falls to nothing with it.

    Args:
        batches: gives ``Rows`` with their features, endlessly.
        held: the same of a batch that is only measured.
        share_of: the share of the time that is over.
        save: called ``every`` so many seconds.
    """
    groups, factors = groups_of(model)
    optimizer = torch.optim.AdamW(groups, lr=how.rate, betas=(0.9, 0.98), fused=base.device != "cpu")
    begun, step, seen, recent, told, saved = time.time(), 0, 0, [], time.time(), time.time()
    plain = How(temperature=how.temperature, decay=1.0, reached=0.0, dropout=0.0)

    def measured() -> list[float]:
        model.eval()
        with torch.no_grad(), torch.autocast(base.device, dtype=torch.bfloat16):
            total, count, hits = loss_of(model, base, vocabulary, *held, plain)
        model.train()
        return [round(x, 4) for x in torch.cat([total[None] / count, hits]).tolist()]

    first = measured()
    say("held out, loss and right guesses by depth:", first)
    while (share := share_of()) < 1:
        warm = min(1.0, (step + 1) / 100)
        rate = how.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = rate * factor
        with torch.autocast(base.device, dtype=torch.bfloat16):
            total, count, hits = loss_of(model, base, vocabulary, *next(batches), how)
        (total / max(count, 1)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen, step = seen + count, step + 1
        recent.append(torch.cat([(total / max(count, 1)).detach()[None], hits.detach()]))
        if time.time() - told > every / 4:
            told, mean = time.time(), torch.stack(recent[-100:]).mean(0).tolist()
            numbers = " ".join(f"{x:.3f}" for x in mean)
            say(f"{told - begun:.0f} s, {share:.3f}, step {step}, {seen / 1e6:.1f} M: {numbers}")
        if time.time() - saved > every:
            saved = time.time()
            save()
            say("held out:", measured())
    last = measured()
    say("held out:", last)
    done = {"steps": step, "positions": seen, "seconds": round(time.time() - begun)}
    return {**done, "held_out": [first, last]}
