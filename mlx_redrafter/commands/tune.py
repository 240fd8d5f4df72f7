"""``mlx-redrafter tune``."""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from ..conversations import Prompt, encode, read_prompts, usable
from ..decoding.state import DraftShape
from ..engine.policy import Policy, StepTimes, policy_for
from ..engine.step_times import candidates, conditions, keep
from ..engine.stopwatch import LONG, PATIENCE, SHORT, calibrate
from ..loading.find import DEFAULT_MODEL
from ..model import DTYPES, load
from ..options import check_range
from ..record import describe_shape
from ..text import stream_generate

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
    check_range("tokens", args.tokens, 0)
    check_range("lookup", args.lookup, 0)
    prompts = read_prompts(args.prompts) if args.prompts else [Prompt([text]) for text in PROMPTS]
    drafter = None if args.drafter == "none" else args.drafter
    model, tokenizer = load(args.model, drafter=drafter, dtype=args.dtype)
    runner = model.prepare()
    shapes = candidates(runner, args.lookup)
    if runner is None or len(shapes) == 1:
        raise ValueError(f"{args.model or DEFAULT_MODEL} is decoded plainly: there is nothing to choose.")
    calibration = calibrate(runner, shapes, args.seconds)
    times, steady = calibration.times, calibration.steady
    policy, read = policy_for(shapes, times), 0
    model.use_policy(policy, args.lookup)
    for ids in usable(prompts, partial(encode, tokenizer=tokenizer))[1] if args.tokens else ():
        read += sum(1 for _ in stream_generate(model, tokenizer, ids, args.tokens, lookup=args.lookup))
    told = choice(shapes, times, policy)
    measured = {"speedup": told["chosen"]["speedup"]} if read and "speedup" in told["chosen"] else {}
    file = keep(runner, shapes, times, **measured) if steady else None
    record = {
        "conditions": conditions(runner, shapes),
        "rounds": calibration.rounds,
        "steady": steady,
        "tokens": read,
        **told,
        "file": file and str(file),
    }
    print(json.dumps(record, indent=1) if args.json else table(record))
    return 0


def choice(shapes: Sequence[DraftShape], times: StepTimes, policy: Policy) -> dict[str, Any]:
    """What each shape costs and gives, and the one that is chosen, after a text of ``SHORT`` tokens."""
    policy.choose(SHORT)  # what it returns may be a trial of another shape
    rows = []
    for shape, seconds, more in zip(shapes, times.seconds, times.per_row, strict=True):
        row: dict[str, Any] = dict(describe_shape(shape))
        if shape in policy.cost:  # the others are hopeless
            row |= {
                "seconds": seconds + SHORT * more,
                "seconds_after_long_text": seconds + LONG * more,
                "plain_steps": policy.cost[shape],
                "tokens_per_step": policy.expected(shape),
                "speedup": policy.rate(shape),
            }
        rows.append(row)
    return {"shapes": rows, "chosen": rows[list(shapes).index(policy.current)]}


def table(record: dict[str, Any]) -> str:
    """The report for people."""
    known, read = record["conditions"], record["tokens"]
    lines = [", ".join(known[key] for key in ("chip", "backend", "blas") if known[key]), ""]
    heads = ("ms/step", f"at {LONG}", "plain steps", "tokens/step", "speed-up")
    lines.append(f"{'draft shape':36}" + "".join(f"{head:>12}" for head in heads))
    for row in record["shapes"]:
        if "seconds" not in row:
            lines.append(f"{name(row):36}   takes longer than it could ever save")
            continue
        times = (1000 * row["seconds"], 1000 * row["seconds_after_long_text"])
        ratios = (row["plain_steps"], row["tokens_per_step"], row["speedup"])
        numbers = [*(f"{x:12.1f}" for x in times), *(f"{x:12.2f}" for x in ratios)]
        lines.append(f"{name(row):36}" + "".join(numbers))
    learned = f"in {read} tokens of answers" if read else "by other drafters, nothing decoded"
    lines += [
        "",
        f"Step times after a text of {SHORT} tokens: medians of {record['rounds']} rounds; after {LONG}:",
        "measured for plain decoding and the largest shape, for the others by their nodes.",
        f"Tokens per step: expected from what was accepted {learned}.",
    ]
    if not record["steady"]:
        lines += [
            "They are not kept: something else uses this machine, or the rounds differ too much, even after",
            f"{PATIENCE} times the time. Run this again when it is idle.",
        ]
    kept = [f"Kept in {record['file']}."] if record["file"] else []
    return "\n".join([*lines, f"Chosen: {reason(record)}", *kept])


def reason(record: dict[str, Any]) -> str:
    """Why the chosen shape is the best."""
    chosen = record["chosen"]
    drafts = [row for row in record["shapes"] if row["max_nodes"] > 1 and "speedup" in row]
    if not drafts:
        return "plain decoding; every draft takes longer than it could ever save."
    best = chosen if chosen["max_nodes"] > 1 else max(drafts, key=lambda row: row["speedup"])
    gain = f"{best['tokens_per_step']:.2f} tokens in the time of {best['plain_steps']:.2f} plain steps."
    if best is chosen:
        return f"{name(best)}, which gives {gain}"
    also = "Others are still tried now and then."
    return f"plain decoding; the best draft, {name(best)}, would give {gain} {also}"


def name(row: dict[str, Any]) -> str:
    """A shape in words."""
    if row["max_nodes"] == 1:
        return "plain"
    parts = [f"{row['beam_width']} x {row['beam_length']} drafted"] * (row["beam_width"] > 0)
    parts += [f"{row['lookup']} copied"] * (row["lookup"] > 0)
    return f"{' + '.join(parts)}, {row['max_nodes']} nodes"
