"""What steps cost on models of real sizes with random weights: nothing to download, nothing to read.

    uv run benchmarks/synthetic.py --sizes 1B 8B --weights bfloat16 4-bit

Speed depends on sizes alone; acceptance does not exist here. Times a step with each of the device's draft
shapes, with a random drafter of the shape that ``train`` makes, and one verification of 1 to 64 tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_redrafter.benchmark.sweep import SIZES, cost_curve
from mlx_redrafter.engine.step_times import candidates
from mlx_redrafter.engine.stopwatch import measure
from mlx_redrafter.model import SpeculativeModel
from mlx_redrafter.models.drafter import Drafter, DrafterConfig

import mlx.core as mx  # isort: skip
from mlx_lm.models import llama  # isort: skip

WEIGHTS = ("float32", "float16", "bfloat16", "4-bit", "8-bit")  # quantized ones with bfloat16 activations
ROUNDS = 9  # of the cost curve
SHARE_OF_MEMORY = 0.7  # that a model may take


@dataclass(frozen=True)
class Size:
    """A model like Llama 3's of this name."""

    hidden: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int = 128_256
    tied: bool = False
    draft_vocabulary: int = 16_384

    def arguments(self) -> dict[str, Any]:
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-5,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "rope_theta": 500_000.0,
        }


NAMED = {
    "tiny": Size(64, 3, 128, 4, 2, 512, True, 256),
    "1B": Size(2048, 16, 8192, 32, 8, tied=True),
    "3B": Size(3072, 28, 8192, 24, 8, tied=True),
    "8B": Size(4096, 32, 14_336, 32, 8),
}


def main() -> None:
    parser = harness.parser(__doc__, "synthetic.json", "random weights")
    parser.add_argument("--sizes", nargs="+", choices=NAMED, default=["1B"])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["bfloat16", "4-bit"])
    parser.add_argument("--seconds", type=float, default=10.0, help="for the draft shapes of each, about")
    args = parser.parse_args()
    results = []
    for row in run(args.sizes, args.weights, args.seconds):
        results.append(row)
        print(table(row), flush=True)
        harness.write(args, {"results": results})


def run(sizes: Sequence[str], weights: Sequence[str], seconds: float) -> Iterator[dict[str, Any]]:
    """Every size with every kind of weights; those that do not fit into memory are reported as left out."""
    for name in sizes:
        for kind in weights:
            head = {"size": name, "weights": kind}
            needed = bytes_needed(NAMED[name], kind)
            if needed > SHARE_OF_MEMORY * memory():
                yield {**head, "left_out": f"{needed / 1e9:.1f} GB of weights are too many for this machine"}
                continue
            yield {**head, **measured(build(NAMED[name], kind), seconds)}
            mx.clear_cache()


def measured(model: SpeculativeModel, seconds: float) -> dict[str, Any]:
    """Step times and the cost curve of one model."""
    shapes = candidates(model.prepare())
    times = measure(model.prepare(), shapes, seconds)
    assert model.prepare() is not None
    curve = cost_curve(model.prepare().target, SIZES, ROUNDS)
    parameters: Any = tree_flatten(model.model.parameters())
    return {
        "weight_bytes": sum(value.nbytes for _, value in parameters),
        "drafter_bytes": sum(v.nbytes for v in model.drafter.weights().values()) if model.drafter else 0,
        "rounds": len(times.rounds[0]),
        "steady": times.steady,
        "shapes": [
            {"shape": vars(shape), "ms": 1000 * s, "plain_steps": s / times.seconds[0]}
            for shape, s in zip(shapes, times.seconds, strict=True)
            if math.isfinite(s)  # the others are hopeless
        ],
        "cost_curve": curve,
    }


def build(size: Size, kind: str) -> SpeculativeModel:
    """A random model and drafter; weights take their type one by one, so that little memory is needed."""
    bits = int(kind[0]) if kind.endswith("-bit") else None
    dtype = mx.bfloat16 if bits else getattr(mx, kind)
    model = llama.Model(llama.ModelArgs.from_dict(size.arguments()))
    layers = (1, size.layers // 2, size.layers - 1)
    config = DrafterConfig(
        size.hidden, size.vocabulary, size.hidden, 2, True, size.draft_vocabulary, tuple(sorted({*layers}))
    )
    drafter = Drafter(config, mx.arange(size.draft_vocabulary, dtype=mx.int32))
    for part in (model, drafter):
        part.set_dtype(dtype)
        if bits:
            nn.quantize(
                part,
                64,
                bits,
                class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 64 == 0,
            )
        for _, value in tree_flatten(part.parameters()):
            mx.eval(value)
    model.eval()
    return SpeculativeModel(model, drafter)


def bytes_needed(size: Size, kind: str) -> float:
    """Of the weights, about."""
    head = 1 if size.tied else 2
    attention = 2 * size.hidden**2 * (1 + size.kv_heads / size.heads)
    parameters = (
        size.layers * (attention + 3 * size.hidden * size.inner) + head * size.hidden * size.vocabulary
    )
    return float(
        parameters * {"float32": 4, "float16": 2, "bfloat16": 2, "4-bit": 0.5625, "8-bit": 1.0625}[kind]
    )


def memory() -> float:
    """Bytes that the device may use."""
    told = mx.device_info()
    return float(
        told.get("max_recommended_working_set_size")
        or told.get("total_memory")
        or told.get("memory_size")
        or 8e9
    )


def table(row: dict[str, Any]) -> str:
    """Text for people."""
    head = f"{row['size']}, {row['weights']}"
    if "left_out" in row:
        return f"{head}: left out, {row['left_out']}"
    lines = [f"{head}: {row['weight_bytes'] / 1e9:.2f} GB"]
    for told in row["shapes"]:
        s = told["shape"]
        lines.append(
            f"  {tuple(s.values())!s:20} {told['ms']:9.2f} ms {told['plain_steps']:6.2f} plain steps"
        )
    costs = (f"{r['tokens']}: {r['relative']:.2f}" for r in row["cost_curve"]["rows"])
    return "\n".join([*lines, f"  verification, relative to one token: {', '.join(costs)}"])


if __name__ == "__main__":
    main()
