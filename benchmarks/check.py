"""Everything that the owner of a Mac or of an NVIDIA GPU should run once; one file to send us.

    make mac-check      # or cuda-check, cpu-check

1. correctness: greedy tokens in float32 of small random models and of the default model, every draft shape
   of this device against plain decoding on it, and against plain decoding on the CPU;
2. `mlx-redrafter tune`: the time of a step with each draft shape; with `--synthetic` also for models of
   other sizes with random weights;
3. `mlx-redrafter benchmark --cost-curve`: speed against mlx-lm, and the cost of verifying 1 to 64 tokens.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import synthetic

import mlx_redrafter as r
from mlx_redrafter.decoding.state import DraftShape
from mlx_redrafter.engine import backend
from mlx_redrafter.engine.loop import Fixed
from mlx_redrafter.engine.step_times import candidates
from mlx_redrafter.model import SpeculativeModel

import mlx.core as mx  # isort: skip

PLAIN = DraftShape(0, 0)
TIE = 1e-3  # logits this close may be ordered differently by another kernel
# Sizes at which kernels change: head dims, rows x heads per key head, vocabularies off the tile.
SMALL = ({"hidden": 64}, {"hidden": 256, "layers": 4}, {"hidden": 512, "layers": 2, "vocabulary": 1000})


def main() -> None:
    parser = harness.parser(__doc__, "check.json")
    parser.add_argument("--expect", choices=("metal", "cuda", "cpu"), help="fail on any other device")
    parser.add_argument("--tokens", type=int, default=200, help="compared per text (default: 200)")
    parser.add_argument("--texts", type=int, default=4, help="of each model (default: 4)")
    parser.add_argument("--limit", type=int, default=16, help="benchmark's prompts (default: 16)")
    parser.add_argument("--prompts", default=str(Path(__file__).with_name("held_out.jsonl")))
    parser.add_argument("--max-tokens", type=int, default=128, help="of the benchmark's answers")
    parser.add_argument("--seconds", type=float, default=10.0, help="of tune, and for each synthetic model")
    parser.add_argument("--synthetic", nargs="+", default=[], choices=synthetic.NAMED, help="sizes")
    args = parser.parse_args()
    device = backend.current().name
    if args.expect not in (None, device):
        sys.exit(f"error: MLX uses {device} here, not {args.expect}: install MLX for {args.expect}.")
    report: dict[str, Any] = {"device": device}
    report["correctness"] = list(correctness(args.tokens, args.texts))
    report["correctness"] += default_model(args) if args.model != harness.TINY else []
    report["tune"], report["benchmark"] = tune(args), benchmark(args)
    report["synthetic"] = list(synthetic.run(args.synthetic, ("bfloat16", "4-bit"), args.seconds))
    report["passed"] = all(row["passed"] for row in report["correctness"]) and not failed(report)
    harness.write(args, report)
    print(f"{'Passed' if report['passed'] else 'FAILED'}. Please send us {args.output}.")
    sys.exit(not report["passed"])


def failed(report: dict[str, Any]) -> bool:
    return any("error" in report[name] for name in ("tune", "benchmark"))


def correctness(tokens: int, texts: int) -> Iterator[dict[str, Any]]:
    """Small random models, with a random drafter and with none."""
    for sizes in SMALL:
        for drafter in (True, False):
            yield compare(f"random, {sizes}", harness.tiny(drafter, **sizes), tokens, texts)


def default_model(args: Any) -> list[dict[str, Any]]:
    """The model of the flags in float32; a remark if it cannot be had."""
    try:
        drafter = None if args.drafter == "none" else args.drafter
        model, _ = r.load(args.model, drafter=drafter, dtype="float32")
    except (ValueError, OSError) as error:
        return [{"model": args.model, "error": str(error), "passed": True}]
    return [compare(args.model, model, args.tokens, args.texts)]


def compare(name: str, model: SpeculativeModel, tokens: int, texts: int) -> dict[str, Any]:
    """Every shape against plain decoding on this device, and plain decoding here against the CPU's."""
    row: dict[str, Any] = {"model": name, "drafter": model.drafter is not None, "shapes": {}}
    plain = [text(model, PLAIN, 16 + i, tokens) for i in range(texts)]
    for shape in candidates(model.prepare())[1:]:
        drafted = [text(model, shape, 16 + i, tokens) for i in range(texts)]
        row["shapes"][str(shape)] = differences(plain, drafted)
    with on_cpu():
        twin = SpeculativeModel(model.model, model.drafter)
        row["cpu"] = differences([text(twin, PLAIN, 16 + i, tokens) for i in range(texts)], plain)
    found = [*row["shapes"].values(), row["cpu"]]
    row["passed"] = all(gap <= TIE for each in found for gap in each["gaps"])
    print(f"{name}{'' if row['drafter'] else ', no drafter'}: {'same' if row['passed'] else 'DIFFERENT'}")
    return row


Text = tuple[list[int], list[mx.array]]  # tokens, and the logits [V] from which each was picked


def text(model: SpeculativeModel, shape: DraftShape, rows: int, tokens: int) -> Text:
    """What is decoded greedily after a made-up text of ``rows`` tokens."""
    steps = harness.decode(model, Fixed(shape), harness.after_prompt(model, rows), rows)
    said: list[int] = []
    logits: list[mx.array] = []
    for step in steps:
        said += step.tokens
        logits += [step.logits[place] for place in range(len(step.tokens))]
        mx.eval(logits[-len(step.tokens) :])
        if len(said) >= tokens:
            break
    steps.close()
    return said[:tokens], logits[:tokens]


def differences(wanted: Sequence[Text], found: Sequence[Text]) -> dict[str, Any]:
    """How many texts differ, and how far apart the logits of the two tokens were where each first does."""
    gaps = []
    for (tokens, logits), (others, _) in zip(wanted, found, strict=True):
        place = next((i for i, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b), None)
        if place is not None:
            gaps.append(float(logits[place][tokens[place]] - logits[place][others[place]]))
    return {"texts": len(wanted), "differ": len(gaps), "gaps": gaps}


@contextmanager
def on_cpu() -> Iterator[None]:
    usual = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(usual)


def tune(args: Any) -> dict[str, Any]:
    """The record of ``mlx-redrafter tune``."""
    return command(args, "tune", "--seconds", str(args.seconds), "--json")


def benchmark(args: Any) -> dict[str, Any]:
    """The result of ``mlx-redrafter benchmark``."""
    flags = ["--prompts", args.prompts, "--limit", str(args.limit), "--max-tokens", str(args.max_tokens)]
    with tempfile.TemporaryDirectory() as plots:
        return command(args, "benchmark", *flags, "--cost-curve", "--plots", plots, "--json")


def command(args: Any, name: str, *flags: str) -> dict[str, Any]:
    """Run a command and return its record; its error message if it fails."""
    if args.model == harness.TINY:
        return {"skipped": "the random model has no tokenizer"}
    print(f"{name} ...", flush=True)
    usual = ["--model", args.model, "--drafter", args.drafter, "--dtype", args.dtype]
    line = [sys.executable, "-m", "mlx_redrafter", name, *usual, *flags]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr[-2000:], "exit_code": done.returncode}
    record: dict[str, Any] = json.loads(done.stdout)
    return record


if __name__ == "__main__":
    main()
