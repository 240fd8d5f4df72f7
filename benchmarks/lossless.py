"""Is greedy output with a drafter the same as mlx-lm's plain decoding?

    uv run benchmarks/lossless.py --output benchmarks/results/lossless.json

In float32 it must be, token for token. In lower precision a forward pass over several tokens rounds
differently from one over a single token, so two tokens of nearly the same logit may swap: there, this
counts how often outputs first differ per token, and how far apart the two tokens' logits were.
"""

import argparse
import json
import sys
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

import mlx_redrafter as r
from mlx_redrafter.engine import backend
from mlx_redrafter.loading.find import DEFAULT_MODEL, drafter_folder, model_folder
from mlx_redrafter.models.bundle import load_drafter
from mlx_redrafter.models.identity import identity_of

import mlx.core as mx  # isort: skip
import mlx_lm  # isort: skip

SHAPES = ((1, 1), (1, 4), (2, 3), (4, 5), (3, 3, 8))
PROMPTS = (
    "Explain why the sky is blue.",
    "Write a Python function that checks whether a string is a palindrome.",
    "Summarize in two sentences: The city council voted on Tuesday to extend the tram line to the harbour. "
    "Work starts next spring and should take three years. Critics say the cost has doubled since 2020.",
    "Translate into French: Where is the nearest train station?",
    "A farmer has 17 sheep. All but 9 run away. How many are left?",
    "Write a short poem about rain on a tin roof.",
    "List five healthy breakfast ideas with a sentence about each.",
    "What is the difference between a virus and a bacterium?",
    "Draft a polite e-mail asking for a deadline to be moved by one week.",
    "Who was Ada Lovelace, and why is she remembered?",
    "Give me a recipe for lentil soup.",
    "Convert 72 degrees Fahrenheit to Celsius and show the calculation.",
    "Write a dialogue between a cat and a dog about the moon.",
    "What are the main causes of the First World War?",
    "Explain recursion to a ten-year-old.",
    "Write an SQL query that finds the three customers with the most orders.",
    "Name the planets of the solar system in order, with one fact each.",
    "Rewrite this in a formal tone: hey, can't make it today, something came up, sorry!",
    "What should I pack for a week of hiking in the mountains in autumn?",
    "Tell me a story that begins with: The lighthouse had been dark for forty years.",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument(
        "--precision", nargs="+", default=["float32"], help="float32, bfloat16, float16, or quantized-TYPE"
    )
    parser.add_argument("--shapes", nargs="+", default=[",".join(map(str, s)) for s in SHAPES])
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    shapes = [r.DraftShape(*map(int, text.split(","))) for text in args.shapes]
    versions = {name: metadata.version(name) for name in ("mlx", "mlx-lm", "mlx-redrafter")}
    results: list[dict[str, Any]] = []
    for precision in args.precision:
        results.append(measure(args, precision, shapes))
        report = {"model": args.model, "chip": backend.chip(), "versions": versions, "results": results}
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(args.output.read_text())
    sys.exit(any(shape["diverged"] for x in results if x["precision"] == "float32" for shape in x["shapes"]))


def load(name: str, precision: str) -> Any:
    """The model in a precision; "quantized-TYPE" keeps the weights quantized, with activations of a type."""
    if not precision.startswith("quantized-"):
        return r.load(name, dtype=precision)
    dtype = getattr(mx, precision.removeprefix("quantized-"))
    model, tokenizer = mlx_lm.load(str(model_folder(name)))[:2]
    model.set_dtype(dtype)
    identity = identity_of(model)
    drafter = load_drafter(drafter_folder(None, identity), identity, dtype)
    return r.SpeculativeModel(model, drafter), tokenizer


def measure(args: argparse.Namespace, precision: str, shapes: list[r.DraftShape]) -> dict[str, Any]:
    """Compare all shapes with plain decoding in one precision."""
    model, tokenizer = load(args.model, precision)
    found: list[list[dict[str, Any]]] = [[] for _ in shapes]
    for prompt in tqdm(PROMPTS[: args.prompts], desc=precision):
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        plain = list(r.stream_generate(model, tokenizer, ids, args.tokens, draft=False))
        mx.eval([response.logprobs for response in plain])
        for shape, rows in zip(shapes, found, strict=True):
            rows.append(
                compare(plain, list(r.stream_generate(model, tokenizer, ids, args.tokens, shape=shape)))
            )
    return {
        "precision": precision,
        "shapes": [summary(shape, rows) for shape, rows in zip(shapes, found, strict=True)],
    }


def compare(plain: list[Any], drafted: list[r.Response]) -> dict[str, Any]:
    """Where the outputs first differ, if they do, and the two tokens' difference in logit there."""
    pairs = zip_longest((x.token for x in plain), (x.token for x in drafted))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    gap = None
    if same is not None and same < min(len(plain), len(drafted)):
        logprobs = plain[same].logprobs.astype(mx.float32)
        gap = float(logprobs[plain[same].token] - logprobs[drafted[same].token])
    last = drafted[-1]
    return {
        "tokens": len(plain) if same is None else same,
        "diverged": same is not None,
        "gap": gap,
        "steps": last.steps,
        "emitted": last.generation_tokens,
        "speedup": last.generation_tps / plain[-1].generation_tps,
    }


def summary(shape: r.DraftShape, rows: list[dict[str, Any]]) -> dict[str, Any]:
    gaps = sorted(row["gap"] for row in rows if row["gap"] is not None)
    same, diverged = sum(row["tokens"] for row in rows), sum(row["diverged"] for row in rows)
    return {
        "shape": [shape.width, shape.length, shape.size],
        "outputs": len(rows),
        "diverged": diverged,
        "tokens_compared": same,
        "divergences_per_1000_tokens": round(1000 * diverged / (same + diverged), 2),
        "logit_gaps": [round(gap, 4) for gap in gaps],
        "speedup_median": round(median(row["speedup"] for row in rows), 3),
        "tokens_per_step": round((sum(x["emitted"] - 1 for x in rows)) / sum(x["steps"] for x in rows), 3),
    }


if __name__ == "__main__":
    main()
