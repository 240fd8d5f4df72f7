"""Train a drafter with a memory on, with rare tokens, on a CPU without CUDA.

    python rare.py write MODEL ROWS.npz               conversations, for --seconds
    python rare.py features MODEL ROWS.npz FOLDER     once, in parts side by side: --part I --parts N
    python rare.py train MODEL ROWS.npz FOLDER --start DRAFTER --output NAME.safetensors [--seconds N ...]
    python rare.py mean OUTPUT.safetensors NAME.safetensors ...

MODEL is what ``prepare.py`` wrote (for the last two with all of the model's tokens), ROWS has ``toks`` and
``role`` [rows, T] as the shards of ``train`` do.
The base model runs once over the rows; what a drafter reads of it, and its likeliest draft tokens with
their logits, are kept in FOLDER. Runs with other settings from the same start may be averaged.
"""

import argparse
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from base import Base
from run import write_all
from safetensors.torch import load_file, save_file
from torch import nn
from train import DEPTHS, Drafter, Sizes, Vocabulary, _ahead

TOP = 48  # of the teacher's draft tokens; all others together are a few per cent
FILES = {"features": np.int16, "logits": np.float16, "tokens": np.int16, "done": np.int8}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("act", choices=("write", "features", "train", "mean"))
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--start", type=Path)
    parser.add_argument("--batch", type=int, default=64, help="conversations written at once")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json: some are about the model's own code")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 23])
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3000)
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--temperature", type=float, default=1.0, help="of the labels")
    parser.add_argument("--decay", type=float, default=0.8, help="places of a depth that the next one trains")
    parser.add_argument("--rows", type=int, default=12, help="of a batch")
    parser.add_argument("--first", type=int, default=0, help="rows that come four times as often")
    parser.add_argument("--reached", type=float, default=0.0, help="share of it that is only for depths "
                        "that the drafter's first three choices would have led to")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    if args.act == "mean":
        output, *given = args.paths
        parts = [load_file(path) for path in given]
        mean = {name: sum(x[name].float() for x in parts) / len(parts) for name in parts[0]}
        save_file({name: x.to(parts[0][name].dtype) for name, x in mean.items()}, output)
        return
    base = Base(args.paths[0], tuple(args.layers), "cpu", torch.bfloat16)
    if args.act == "write":
        write_rows(args, base)
        return
    rows = dict(np.load(args.paths[1]))
    start = load_file(args.start / "model.safetensors")
    vocabulary = Vocabulary.of(start["draft_to_target"].numpy(), base)
    if args.act == "features":
        keep_features(args, base, vocabulary, rows["toks"].astype(np.int64))
    else:
        train(args, base, vocabulary, rows, start)


def write_rows(args: argparse.Namespace, base: Base) -> None:
    prompts = dict(np.load(args.paths[0] / "prompts.npz"))
    how = {"batch": args.batch, "long_batch": 0, "short": args.length, "tokenizer": args.tokenizer}
    kept = write_all(SimpleNamespace(**how), base, prompts, time.time() + args.seconds, print)
    if "short" not in kept:
        raise SystemExit(f"error: no batch was written in {args.seconds} s: give more --seconds.")
    np.savez(args.paths[1], toks=base.ids.numpy()[kept["short"]], role=kept["short_trained"])


def opened(folder: Path, rows: int, length: int, width: int) -> dict[str, np.ndarray]:
    """The files of what is kept; new ones are empty."""
    shapes = {"features": (rows, length, width), "done": (rows,)}
    found = {}
    for name, dtype in FILES.items():
        path = folder / f"{name}.npy"
        shape = shapes.get(name, (rows, length, TOP))
        how = {"mode": "r+"} if path.exists() else {"mode": "w+", "dtype": dtype, "shape": shape}
        found[name] = np.lib.format.open_memmap(path, **how)
    return found


@torch.no_grad()
def keep_features(args: argparse.Namespace, base: Base, vocabulary: Vocabulary, tokens: np.ndarray) -> None:
    kept = opened(args.paths[2], *tokens.shape, base.hidden * (1 + len(args.layers)))
    head = base.head[vocabulary.places]
    for first in range(4 * args.part, len(tokens), 4 * args.parts):
        some = slice(first, first + 4)
        features = base.features(torch.from_numpy(tokens[some]))
        logits, best = (features[..., : base.hidden] @ head.T).float().topk(TOP, -1)
        kept["features"][some] = features.view(torch.int16).numpy()
        kept["logits"][some], kept["tokens"][some] = logits.half().numpy(), best.to(torch.int16).numpy()
        kept["done"][some] = 1


class CrossEntropy(torch.autograd.Function):
    """The weighted sum of -p · log softmax([x Wᵀ, y Eᵀ + b]), and the rank of each label; one pass."""

    @staticmethod
    def forward(ctx, x, w, y, e, bias, shown, p, places, label, weight):
        more = ((y @ e.T).float() + bias).masked_fill(~shown, -1e9)
        logits = torch.cat([(x @ w.T).float(), more], 1)
        rank = (logits > logits.gather(1, label[:, None])).sum(1)
        logits -= logits.amax(1, keepdim=True)
        chosen = logits.gather(1, places)
        q = logits.exp_()
        total = q.sum(1, keepdim=True)
        loss = -(p * (chosen - total.log())).sum(1)
        q /= total
        q.scatter_add_(1, places, -p)
        q *= weight[:, None]
        common, rare = q.to(x.dtype).split([len(w), len(e)], dim=1)
        ctx.save_for_backward(common @ w, common.T @ x, rare @ e, rare.float().sum()[None])
        ctx.mark_non_differentiable(rank)
        return (loss * weight).sum(), rank

    @staticmethod
    def backward(ctx, upstream, _):
        dx, dw, dy, db = (part * upstream for part in ctx.saved_tensors)
        return dx, dw, dy, None, db, None, None, None, None, None


def with_rare(start: dict, base: Base, vocabulary: Vocabulary) -> Drafter:
    """The network; logits of rare tokens begin as the head's rows would be, were they a map of embeddings."""
    tensors = {name: x.float() for name, x in start.items() if name != "draft_to_target"}
    exit_dim, inputs = tensors["input_proj.weight"].shape
    heads = len(tensors["memory_sink"])
    head_size = len(tensors["memory_q_norm.weight"])
    blocks = sum(name.endswith(".linear.bias") for name in tensors)
    sizes = Sizes(base.hidden, inputs - base.hidden, exit_dim, blocks, len(vocabulary.places), "simple",
                  heads, head_size)  # fmt: skip
    model = Drafter(sizes)
    known = base.embedding[vocabulary.places].float()
    square = known.T @ known
    ridge = 1e-3 * square.diagonal().mean() * torch.eye(len(square))
    rows = next(x for name, x in tensors.items() if x.shape == (len(known), exit_dim))
    model.rare_proj = nn.Linear(exit_dim, base.hidden, bias=False)
    model.rare_proj.weight = nn.Parameter(torch.linalg.solve(square + ridge, known.T @ rows))
    model.rare_bias = nn.Parameter(torch.zeros(1))
    missing, unknown = model.load_state_dict(tensors, strict=False)
    assert not unknown and all(name.startswith("rare") for name in missing), (missing, unknown)
    model.memory_decay.requires_grad_(False)  # rows of training are short, texts are not
    return model


def loss_of(args, model, base, vocabulary, tokens, trained, features, logits, best, dropout=0.1):
    """Summed weighted loss of rows [B, T], how many places counted, right first choices [L]."""
    embedding, (b, t) = base.embed(tokens), tokens.shape
    places, common = torch.arange(t), len(vocabulary.places)
    p = model.context(F.dropout(features, dropout))
    new, state = model.read(embedding), torch.zeros((b, t, base.hidden), dtype=embedding.dtype)
    label = vocabulary.of_place[tokens]  # [B, T]
    is_rare = label < 0
    rare = torch.unique(tokens[is_rare])  # [U]
    number = torch.searchsorted(rare, tokens.clamp(max=int(rare.max())))
    first = torch.full((b, len(rare)), t + 1)  # [B, U] where each comes first
    row, place = is_rare.nonzero(as_tuple=True)
    first.view(-1).scatter_reduce_(0, row * len(rare) + number[row, place], place, "amin")
    shown = (first[:, None] <= places[None, :, None] + 1).flatten(0, 1)  # [B * T, U]
    own_first = torch.where(is_rare, first.gather(1, torch.where(is_rare, number, 0)), -1)
    label = torch.where(is_rare, common + number, label)
    e = base.embedding[rare]
    teacher = (features[..., : base.hidden].flatten(0, 1) @ e.T).float()  # [B * T, U]
    mask, xs, masks = _ahead(trained, 1, False), [], []
    for depth in range(1, DEPTHS + 1):
        state = model.update(_ahead(new, depth, 0.0), state)
        xs.append(p + model.of_state(state))
        known = _ahead(own_first, depth + 1, t + 1) <= places + 1
        mask = mask & _ahead(trained, depth + 1, False) & known
        if depth > 1:
            mask = mask & (torch.rand(b, t) < args.decay)
        masks.append(mask)
    keys, values = model.entries(model.context(features), embedding)
    x = torch.stack(xs, dim=2)
    x = x + model.attend(x, keys, values, places[:, None] - places)
    total, hits, alive = 0.0, [], torch.ones(b * t)
    for depth in range(1, DEPTHS + 1):
        chosen = masks[depth - 1].flatten().nonzero()[:, 0]
        seen = shown[chosen]
        likely = torch.cat([logits[chosen + depth], teacher[chosen + depth].masked_fill(~seen, -1e9)], 1)
        others = (common + torch.arange(len(rare))).expand(len(chosen), -1)
        y = F.dropout(model.trunk(x[:, :, depth - 1].flatten(0, 1)[chosen]), dropout)
        weight = 1 - args.reached + args.reached * alive[chosen]
        value, rank = CrossEntropy.apply(
            y,
            model.lm_head[-1].weight.to(y.dtype),
            model.rare_proj(y),
            e,
            model.rare_bias,
            seen,
            torch.softmax(likely / args.temperature, -1),
            torch.cat([best[chosen + depth], others], 1),
            label.flatten()[chosen + depth + 1],
            weight,
        )
        total = total + value
        hits.append((rank == 0).float().mean())
        alive = alive * torch.zeros(b * t).index_put((chosen,), (rank < 3).float())
    return total, int(masks[0].sum()), torch.stack(hits)


def train(args: argparse.Namespace, base: Base, vocabulary: Vocabulary, rows: dict, start: dict) -> None:
    """Until the time is up; what is written are the weights' running means."""
    model = with_rare(start, base, vocabulary)
    tokens, role = rows["toks"].astype(np.int64), rows["role"] > 0
    kept = opened(args.paths[2], *tokens.shape, base.hidden * (1 + len(args.layers)))
    kinds: dict[tuple[float, float], list] = {}  # by the factor of the rate and the decay of weights
    for name, x in model.named_parameters():
        rare = name.startswith("rare")
        kind = ((25.0 if x.ndim == 1 else 2.0) if rare else 1.0, 0.01 if x.ndim > 1 and not rare else 0.0)
        if x.requires_grad:
            kinds.setdefault(kind, []).append(x)
    groups = [{"params": some, "weight_decay": decay} for (_, decay), some in kinds.items()]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98))
    mean = {name: x.detach().clone() for name, x in model.state_dict().items()}
    random, order, begun, told, step, seen = np.random.default_rng(args.seed), [], time.time(), 0.0, 0, 0
    while (share := (time.time() - begun) / args.seconds) < 1:
        fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
        for group, (factor, _) in zip(optimizer.param_groups, kinds, strict=True):
            group["lr"] = factor * args.rate * min(1, (step + 1) / 60) * fall
        if len(order) < args.rows:
            done = np.flatnonzero(kept["done"])
            order = random.permutation(np.repeat(done, np.where(done < args.first, 4, 1))).tolist()
        some, order = np.unique(order[: args.rows]), order[args.rows :]
        features = torch.from_numpy(kept["features"][some]).view(torch.bfloat16)
        logits = torch.from_numpy(kept["logits"][some]).float().flatten(0, 1)
        best = torch.from_numpy(kept["tokens"][some]).long().flatten(0, 1)
        given = torch.from_numpy(tokens[some]), torch.from_numpy(role[some]), features, logits, best
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total, count, hits = loss_of(args, model, base, vocabulary, *given)
        (total / count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, seen = step + 1, seen + count
        keep = min(0.997, step / (step + 19))
        with torch.no_grad():
            for name, x in model.state_dict().items():
                mean[name].lerp_(x, 1 - keep)
        if time.time() - told > 60:
            told = time.time()
            print(f"{told - begun:.0f} s, step {step}, {seen:,} positions:", total.item() / count, hits)
    tensors = {name: x.to(torch.bfloat16).contiguous() for name, x in mean.items()}
    tensors["draft_to_target"] = start["draft_to_target"]
    save_file(tensors, args.output, {"training": json.dumps({"steps": step, "positions": seen})})


if __name__ == "__main__":
    main()
