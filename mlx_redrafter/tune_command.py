"""``mlx-redrafter tune``."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from .calibrate import PATIENCE, Measured, candidates, conditions, keep, measure
from .decoding.policy import Policy
from .decoding.step import DraftShape
from .generate_command import describe_shape
from .model import DEFAULT_MODEL, DTYPES, SpeculativeModel, load
from .prompts import Prompt, encode, read_prompts
from .stream import stream_generate

PROMPTS = (
    "Explain why the sky is blue.",
    "Write a Python function that checks whether a string is a palindrome, with three examples of its use.",
    "Draft a short e-mail that asks for a deadline to be moved by one week.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add = parser.add_argument
    add("--model", help=f"folder, GGUF file or Hugging Face repository (default: {DEFAULT_MODEL})")
    add("--drafter", default="auto", help="folder, shipped name or repository; auto; none")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights")
    add("--lookup", type=int, help="tokens to copy from the text per step at most (default: as it pays)")
    add("--seconds", type=float, default=10.0, help="to measure step times, about")
    add("--prompts", help="JSONL file of prompts whose answers show what is accepted (default: three)")
    add("--tokens", type=int, default=100, help="of each answer, at most; 0 answers nothing")
    add("--json", action="store_true", help="print one JSON record and nothing else")


def run(args: argparse.Namespace) -> int:
    """Measure the step times anew, keep them, and say which draft shape is used and why."""
    if not 0 < args.seconds < float("inf"):
        raise ValueError(f"--seconds {args.seconds} is not usable: give more than 0.")
    if args.tokens < 0:
        raise ValueError(f"--tokens {args.tokens} is not usable: give 0 or more.")
    if args.lookup is not None and args.lookup < 0:
        raise ValueError(f"--lookup {args.lookup} is not usable: give 0 or more.")
    prompts = read_prompts(args.prompts) if args.prompts else [Prompt([text]) for text in PROMPTS]
    drafter = None if args.drafter == "none" else args.drafter
    model, tokenizer = load(args.model, drafter=drafter, dtype=args.dtype)
    shapes = candidates(model, args.lookup)
    if model.target is None or len(shapes) == 1:
        raise ValueError(f"{args.model or DEFAULT_MODEL} is decoded plainly: there is nothing to choose.")
    measured = measure(model, shapes, args.seconds)
    policy, read = Policy(shapes, measured.seconds), 0
    model._policies[args.lookup] = policy
    for prompt in prompts if args.tokens else ():
        ids = encode(prompt, tokenizer)
        read += sum(1 for _ in stream_generate(model, tokenizer, ids, args.tokens, lookup=args.lookup))
    file = keep(model, shapes, measured.seconds) if measured.steady else None
    record = report(model, shapes, measured, policy, read) | {"file": file and str(file)}
    print(json.dumps(record, indent=1) if args.json else table(record))
    return 0


def report(
    model: SpeculativeModel, shapes: Sequence[DraftShape], measured: Measured, policy: Policy, read: int
) -> dict[str, Any]:
    """What was measured and chosen, as JSON.

    Args:
        read: tokens from which the policy has learned what is accepted.
    """
    rows = [
        {
            **describe_shape(shape),
            "seconds": seconds,
            "plain_steps": policy.cost[shape],
            "tokens_per_step": policy.expected(shape),
            "speedup": policy.rate(shape),
        }
        for shape, seconds in zip(shapes, measured.seconds, strict=True)
    ]
    return {
        "conditions": conditions(model, shapes),
        "rounds": len(measured.rounds[0]),
        "steady": measured.steady,
        "tokens": read,
        "shapes": rows,
        "chosen": rows[shapes.index(policy.current)],
    }


def table(record: dict[str, Any]) -> str:
    """The report for people."""
    known = record["conditions"]
    machine = [known["chip"], known["backend"], known["blas"]]
    lines = [", ".join(str(part) for part in machine if part), ""]
    lines.append(f"{'draft shape':36} {'ms/step':>8} {'plain steps':>11} {'tokens/step':>11} {'speed-up':>8}")
    for row in record["shapes"]:
        lines.append(
            f"{name(row):36} {1000 * row['seconds']:8.1f} {row['plain_steps']:11.2f} "
            f"{row['tokens_per_step']:11.2f} {row['speedup']:8.2f}"
        )
    learned = (
        f"in {record['tokens']} tokens of answers"
        if record["tokens"]
        else "by other drafters, nothing decoded"
    )
    lines += [
        "",
        f"Step times: medians of {record['rounds']} rounds. Tokens per step: as accepted {learned}.",
    ]
    if not record["steady"]:
        lines.append(
            f"The rounds differ too much, even after {PATIENCE} times the time, to be kept: something"
        )
        lines.append("else uses this machine. Run this again when it is idle.")
    return "\n".join(
        [*lines, f"Chosen: {reason(record)}", *([f"Kept in {record['file']}."] if record["file"] else [])]
    )


def reason(record: dict[str, Any]) -> str:
    """Why the chosen shape is the best."""
    chosen = record["chosen"]
    if chosen["max_nodes"] > 1:
        return (
            f"{name(chosen)}, which gives {chosen['tokens_per_step']:.2f} tokens in the time of "
            f"{chosen['plain_steps']:.2f} plain steps."
        )
    best = max((row for row in record["shapes"] if row["max_nodes"] > 1), key=lambda row: row["speedup"])
    return (
        f"plain decoding; the best draft, {name(best)}, would give {best['tokens_per_step']:.2f} tokens in "
        f"the time of {best['plain_steps']:.2f} plain steps. Others are still tried now and then."
    )


def name(row: dict[str, Any]) -> str:
    """A shape in words."""
    if row["max_nodes"] == 1:
        return "plain"
    parts = [f"{row['beam_width']} x {row['beam_length']} drafted"] * (row["beam_width"] > 0)
    parts += [f"{row['lookup']} copied"] * (row["lookup"] > 0)
    return f"{' + '.join(parts)}, {row['max_nodes']} nodes"
