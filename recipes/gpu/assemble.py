"""A drafter folder from what ``run.py`` left.

    python assemble.py MODEL OUTPUT LAYERS PART ... [--store-bits 8] [--training NAME.json --start DRAFTER]

LAYERS are the context's layers, as 8,16,23.
"""

import argparse
import json
from pathlib import Path

import mlx_redrafter as r
from mlx_redrafter.models.drafter import DrafterConfig, Quantization
from mlx_redrafter.models.identity import identity_of
from mlx_redrafter.models.save import write_drafter

import mlx.core as mx  # isort: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="as mlx-redrafter generate takes it")
    parser.add_argument("output", type=Path)
    parser.add_argument("layers")
    parser.add_argument("parts", type=Path, nargs="+")
    parser.add_argument("--name", help="of the base model")
    parser.add_argument("--store-bits", type=int)
    parser.add_argument("--rare-tokens", type=int, default=128)
    parser.add_argument("--training", type=Path, help="what run.py tells of the run")
    parser.add_argument("--start", type=Path, help="the folder of the drafter that the run began with")
    args = parser.parse_args()
    weights = {name: x for part in args.parts for name, x in mx.load(str(part)).items()}
    model, _ = r.load(args.model, drafter=None)
    identity = identity_of(model.model, args.name or args.model)
    exit_dim, inputs = weights["input_proj.weight"].shape
    layers = tuple(map(int, args.layers.split(",")))
    hidden = inputs // (2 + len(layers))
    heads = weights["memory_sink"].size
    blocks = sum(name.endswith(".linear.bias") for name in weights)
    config = DrafterConfig(
        hidden, identity.vocab_size, exit_dim, blocks, True, weights["draft_to_target"].size, layers,
        memory_heads=heads, memory_head_size=weights["memory_q.weight"].shape[0] // heads,
        rare_tokens=args.rare_tokens if "rare_bias" in weights else 0,
    )  # fmt: skip
    stored = Quantization(args.store_bits, 64) if args.store_bits else None
    phases = []
    if args.start:
        phases = json.loads((args.start / "config.json").read_text())["mlx_redrafter"]["training"]["phases"]
    if args.training:
        phases.append(json.loads(args.training.read_text()))
    steps = sum(phase["steps"] for phase in phases)
    extra = {"training": {"steps": steps, "phases": phases}} if phases else {}
    write_drafter(args.output, config, weights, identity, extra, stored=stored)


main()
