"""Is decoding at least as fast as plain decoding, even beside another busy process?

    uv run benchmarks/busy.py            # 8 prompts, 96 tokens each
    uv run benchmarks/busy.py --quick    # 2 prompts, 32 tokens each

Every prompt is answered by mlx-lm's plain decoding and by this package with its automatic shape, one after
the other, on the machine as it is and then beside a process that never rests; so each ratio is one of
neighbours in time. Answers are timed as in `mlx-redrafter benchmark`. The policy keeps what
it learns from prompt to prompt, as in any program that answers several.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import harness
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mlx_redrafter as r
from mlx_redrafter.benchmark.contenders import mlx_lm_contender, our_contender
from mlx_redrafter.benchmark.energy import find_meter
from mlx_redrafter.benchmark.measure import Asked, Plan, measure, turns_of, warm_up
from mlx_redrafter.benchmark.report import BASELINE, OURS
from mlx_redrafter.benchmark.sources import load_prompts, sample
from mlx_redrafter.benchmark.statistics import ratio, shapes_used, speed
from mlx_redrafter.engine.backend import current
from mlx_redrafter.model import SpeculativeModel
from mlx_redrafter.options import DecodingOptions, PromptOptions

LEAST = 0.95  # the median ratio that passes
WARM_UP = 16  # tokens
NEVER_RESTS = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"


def main() -> None:
    parser = harness.parser(__doc__, "busy.json")
    parser.add_argument("--prompts", default=str(Path(__file__).with_name("held_out.jsonl")))
    parser.add_argument("--limit", type=int, default=8, help="prompts (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=96, help="of each answer (default: 96)")
    parser.add_argument("--processes", type=int, default=1, help="that never rest (default: 1)")
    parser.add_argument("--quick", action="store_true", help="2 prompts of 32 tokens")
    args = parser.parse_args()
    if args.quick:
        args.limit, args.max_tokens = 2, 32
    plan, (meter, _) = prepared(args), find_meter(current().name)
    prompts, rows = sample(load_prompts(args.prompts), args.limit), []
    warm_up(plan, plan.encode(turns_of(prompts[0])[0]), WARM_UP)  # step times are measured here
    for prompt in prompts:
        row = {}
        for name, processes in (("quiet", 0), ("busy", args.processes)):
            with busy(processes):
                row[name] = told(next(measure(plan, [prompt], meter)))
        rows.append(row)
        print("; ".join(f"{name}: {line(answers)}" for name, answers in row.items()), flush=True)
    medians = {name: middle([row[name]["ratio"] for row in rows]) for name in ("quiet", "busy")}
    passed = all(value is not None and value >= LEAST for value in medians.values())
    print(f"Medians of the ratios: {medians}: {'passed' if passed else 'FAILED'}.")
    harness.write(args, {"passed": passed, "medians": medians, "results": rows})
    sys.exit(not passed)


def prepared(args: argparse.Namespace) -> Plan:
    """Both contenders, with the settings that `mlx-redrafter benchmark` has if nothing is said."""
    usual, (model, tokenizer) = DecodingOptions(), loaded(args)
    contenders = [mlx_lm_contender(model, tokenizer, usual), our_contender(model, tokenizer, usual, None)]
    return Plan(contenders, partial(PromptOptions().encode, tokenizer=tokenizer), args.max_tokens, 1)


def loaded(args: argparse.Namespace) -> tuple[SpeculativeModel, Any]:
    """The model that the flags name; the random one gets a tokenizer that knows numbers only."""
    if args.model != harness.TINY:
        drafter = None if args.drafter == "none" else args.drafter
        return r.load(args.model, drafter=drafter, dtype=args.dtype)
    model = harness.load(args)
    words = {str(token): token for token in range(model.vocabulary or 1)}
    numbers = Tokenizer(models.WordLevel(words, unk_token="0"))
    numbers.pre_tokenizer = pre_tokenizers.Whitespace()
    return model, TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=numbers))


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that never rest, while the block runs."""
    line = [sys.executable, "-c", NEVER_RESTS]
    running = [subprocess.Popen(line) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def told(asked: Asked) -> dict[str, Any]:
    """Tokens per second of both, their ratio, and how many of our steps speculated."""
    shapes = shapes_used(asked.runs(OURS))
    return {
        "plain_tps": speed(asked.runs(BASELINE)),
        "our_tps": speed(asked.runs(OURS)),
        "ratio": ratio(asked, OURS, BASELINE),
        "same": all(repeat.divergence is None for repeat in asked.repeats),
        "steps": sum(shapes.values()),
        "speculative": sum(steps for shape, steps in shapes.items() if shape.size > 1),
    }


def line(row: dict[str, Any]) -> str:
    """Text for people."""
    if row["ratio"] is None:
        return "too short to be timed"
    speeds = f"{row['our_tps']:.1f} / {row['plain_tps']:.1f} tokens/s = {row['ratio']:.2f}"
    return f"{speeds}, {row['speculative']} of {row['steps']} steps speculative"


def middle(ratios: list[float | None]) -> float | None:
    known = [value for value in ratios if value is not None]
    return round(median(known), 4) if known else None


if __name__ == "__main__":
    main()
