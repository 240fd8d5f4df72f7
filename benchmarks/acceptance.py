"""How many of a drafter's tokens does the model accept, by real decoding of many prompts at once?

    uv run benchmarks/acceptance.py --drafter my-drafter --output results.json

Tokens per step and acceptance do not depend on the machine; this says nothing about speed. Results are
written after each draft shape, so a run that was cut short leaves those that were done.
"""

import argparse
import json
import os
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx_redrafter as r
from mlx_redrafter.blas import set_blas_threads
from mlx_redrafter.commands.main import one_line
from mlx_redrafter.conversations import Prompt, read_prompts
from mlx_redrafter.loading.find import DEFAULT_MODEL
from mlx_redrafter.train.card import category_table, environment, evaluation_table
from mlx_redrafter.train.evaluate import Measured, evaluate, parse_shape
from mlx_redrafter.train.streams import Workers

HELD_OUT = Path(__file__).parent / "held_out.jsonl"


def main() -> None:
    args = build_parser().parse_args()
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_line(str(error))}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--drafter", default="auto", help="folder, repository, or auto: the one that ships")
    parser.add_argument("--dtype", default="auto", help="of the weights, as mlx-redrafter generate has it")
    parser.add_argument("--prompts", nargs="+", action="extend", help="JSONL files (default: held_out.jsonl)")
    parser.add_argument(
        "--shapes", nargs="+", default=["1,4", "4,5"], help="width,length[,nodes[,lookup]]; nodes may be all"
    )
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0], help="0 is greedy")
    parser.add_argument("--tokens", type=int, default=256, help="per answer, at most")
    parser.add_argument("--batch", type=int, default=8, help="prompts decoded at once")
    parser.add_argument("--workers", type=int, help="batches side by side (default: one per core on a CPU)")
    parser.add_argument("--limit", type=int, help="prompts of each file, at most: evenly spaced ones")
    parser.add_argument("--seconds", type=float, help="per draft shape, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure each shape on the prompts of each file, and write what is known so far."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    shapes = [parse_shape(text) for text in args.shapes]
    files = {Path(path).name: sample(read_prompts(path), args.limit) for path in args.prompts or [HELD_OUT]}
    workers = Workers(args.workers)
    set_blas_threads(1 if workers.count > 1 else os.cpu_count() or 1)
    model, tokenizer = r.load(args.model, drafter=args.drafter, dtype=args.dtype)
    results: list[dict[str, Any]] = []
    for path, prompts in files.items():
        measured: list[Measured] = []
        for shape in shapes:
            found = measure(args, model, tokenizer, prompts, shape, workers)
            measured += found
            results += [{"file": path, **record(m)} for m in found]
            write_json(args.output, {**about(args), "results": results})
        print(f"\n{path}\n\n{evaluation_table(measured)}\n\n{category_table(measured)}", flush=True)


def sample(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """Evenly spaced prompts, because files are often sorted by category."""
    if limit is None or limit >= len(prompts):
        return prompts
    if limit < 1:
        raise ValueError(f"--limit {limit} is not usable: give 1 or more.")
    return [prompts[i * len(prompts) // limit] for i in range(limit)]


def measure(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    shape: r.DraftShape,
    workers: Workers,
) -> list[Measured]:
    return evaluate(
        model,
        tokenizer,
        prompts,
        [shape],
        args.temperature,
        args.tokens,
        args.batch,
        args.seed,
        deadline=None if args.seconds is None else time.monotonic() + args.seconds,
        workers=workers,
    )


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What was measured, and on what."""
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "prompts")}
    return {"command": shlex.join(sys.argv), "settings": settings, "environment": environment()}


def record(measured: Measured) -> dict[str, Any]:
    """A measurement as JSON, rounded to what means something."""
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in asdict(measured).items()
    } | {
        "acceptance": [round(share, 4) for share in measured.acceptance],
        "by_category": {name: round(value, 4) for name, value in measured.by_category.items()},
    }


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write the file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()
