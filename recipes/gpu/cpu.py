"""Write conversations and train a drafter on them without CUDA, one core for each process.

    python cpu.py write MODEL ROWS.npz               conversations, for --seconds
    python cpu.py features MODEL ROWS.npz FEATURES   once, in parts side by side: --part I --parts N
    python cpu.py train MODEL ROWS.npz FEATURES --start DRAFTER --output NAME.safetensors [--seconds N ...]
    python cpu.py mean OUTPUT.safetensors NAME.safetensors ...

MODEL is what ``prepare.py`` wrote, with all of the model's tokens; ROWS has ``toks`` and ``role`` [rows, T],
as the shards of ``train`` do; FEATURES is a folder. Runs with other settings from one start may be averaged.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from base import Base
from run import write_all
from safetensors.torch import load_file, save_file
from train import How, Rows, Vocabulary, train, with_rare


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("act", choices=("write", "features", "train", "mean"))
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--start", type=Path, help="a drafter's folder")
    parser.add_argument("--batch", type=int, default=128, help="conversations written at once")
    parser.add_argument("--length", type=int, default=448, help="tokens of each")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json: some are about the model's own code")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 23])
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3000)
    parser.add_argument("--rows", type=int, default=6, help="of a batch")
    parser.add_argument("--rate", type=float, default=4e-4)
    for name in ("temperature", "decay", "reached", "dropout"):
        parser.add_argument(f"--{name}", type=float, default=getattr(How, name))
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
    {"write": write_rows, "features": keep_features, "train": train_on}[args.act](args, base)


def write_rows(args: argparse.Namespace, base: Base) -> None:
    prompts = dict(np.load(args.paths[0] / "prompts.npz"))
    how = {"batch": args.batch, "long_batch": 0, "long_share": 0, "short": args.length}
    how |= {"tokenizer": args.tokenizer, "seed": args.seed}
    kept = write_all(SimpleNamespace(**how), base, prompts, time.time() + args.seconds, print)
    if "short" not in kept:
        raise SystemExit(f"error: no batch was written in {args.seconds} s: give more --seconds.")
    np.savez_compressed(args.paths[1], toks=base.ids.numpy()[kept["short"]], role=kept["short_trained"])


def opened(args: argparse.Namespace, base: Base, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """What the drafter reads of the model [rows, T, F], in bfloat16, and which rows have it."""
    args.paths[2].mkdir(parents=True, exist_ok=True)
    shapes = {"features": (rows, length, base.hidden * (1 + len(args.layers))), "done": (rows,)}
    found = []
    for name, shape in shapes.items():
        path = args.paths[2] / f"{name}.npy"
        how = {"mode": "r+"} if path.exists() else {"mode": "w+", "dtype": np.int16, "shape": shape}
        found.append(np.lib.format.open_memmap(path, **how))
    return found[0], found[1]


def keep_features(args: argparse.Namespace, base: Base) -> None:
    tokens = np.load(args.paths[1])["toks"].astype(np.int64)
    features, done = opened(args, base, *tokens.shape)
    for first in range(4 * args.part, len(tokens), 4 * args.parts):
        some = slice(first, first + 4)
        features[some] = base.features(torch.from_numpy(tokens[some])).view(torch.int16).numpy()
        done[some] = 1


def train_on(args: argparse.Namespace, base: Base) -> None:
    kept = dict(np.load(args.paths[1]))
    start = load_file(args.start / "model.safetensors")
    vocabulary = Vocabulary.of(start["draft_to_target"].numpy(), base)
    model = with_rare(start, base, vocabulary)
    features, done = opened(args, base, *kept["toks"].shape)
    rows = Rows.of(kept["toks"].astype(np.int64), kept["role"] > 0, vocabulary)
    chance = np.random.default_rng(args.seed)

    def batch(some: np.ndarray) -> tuple[Rows, torch.Tensor]:
        some = np.sort(some)
        return rows[torch.from_numpy(some)], torch.from_numpy(features[some]).view(torch.bfloat16)

    def batches(usable: np.ndarray) -> Iterator[tuple[Rows, torch.Tensor]]:
        while True:
            order = chance.permutation(usable)
            for first in range(0, len(order) - args.rows + 1, args.rows):
                yield batch(order[first : first + args.rows])

    def save() -> None:
        tensors = {name: x.detach().to(torch.bfloat16).contiguous() for name, x in model.state_dict().items()}
        tensors["draft_to_target"] = start["draft_to_target"]
        save_file(tensors, args.output)

    usable = np.flatnonzero(done)
    held, usable = usable[::97], np.delete(usable, np.s_[::97])
    how = How(args.rate, args.temperature, args.decay, args.reached, args.dropout)
    begun = time.time()

    def share() -> float:
        return (time.time() - begun) / args.seconds

    def say(*words: object) -> None:
        print(*words, flush=True)

    data = batches(usable), batch(held)
    told = train(model, base, vocabulary, *data, share, how, save=save, say=say, every=600)
    save()
    print(json.dumps(told))


if __name__ == "__main__":
    main()
