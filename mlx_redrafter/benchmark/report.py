"""The result of a benchmark: one JSON object, and the tables made from it."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..loading.files import atomic_file
from .concurrency import concurrency_table
from .lengths import lengths_table
from .measure import Asked, Plan, Repeat
from .phases import phase_table
from .statistics import equality, ratio, speed, summary, tokens_per_step
from .sweep import cost_table, sweep_table
from .tables import Table, number, speedup

BASELINE, OURS, DRAFT_MODEL = "mlx-lm", "mlx-redrafter", "mlx-lm with draft model"
FORMAT = 1
DIGITS = 5  # significant ones in the JSON
NUMBERS = re.compile(r"\[\s+((?:-?[\d.e+-]+,\s+)*-?[\d.e+-]+)\s+\]")  # a list of numbers over several lines


def build(
    plan: Plan, asked: Sequence[Asked], machine: dict[str, Any], settings: dict[str, Any], prompts: int
) -> dict[str, Any]:
    """The report of the prompts that were finished, of as many as ``prompts`` that were to be asked."""
    report = {
        "format": FORMAT,
        **_groups(plan, asked, OURS),
        "finished": len(asked),
        "asked": prompts,
        "machine": machine,
        "settings": settings,
        "prompts": [_prompt(prompt, plan.exact) for prompt in asked],
    }
    if any(contender.name == DRAFT_MODEL for contender in plan.contenders):
        report["draft_model"] = _groups(plan, asked, DRAFT_MODEL)
    return report


def write(report: dict[str, Any], path: Path) -> None:
    """Write the JSON whole or not at all."""
    with atomic_file(path) as new:
        new.write_text(dumps(report), "utf-8")


def dumps(report: dict[str, Any]) -> str:
    """JSON with a line for each entry, but lists of numbers on one line."""
    text = json.dumps(rounded(report), indent=1, ensure_ascii=False, allow_nan=False)
    return NUMBERS.sub(lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", text) + "\n"


def read(path: Path) -> dict[str, Any]:
    """A report from its file.

    Raises:
        ValueError: it is none.
    """
    try:
        report = json.loads(path.expanduser().read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name a result of --json.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): name a result of --json.") from error
    keys = ("overall", "categories", "machine", "settings")
    if not isinstance(report, dict) or not all(isinstance(report.get(key), dict) for key in keys):
        raise ValueError(f"{path} is no result of mlx-redrafter benchmark: name a file that --json wrote.")
    return report


def rounded(value: Any) -> Any:
    """The same with numbers rounded to what means something."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def tables(report: dict[str, Any]) -> list[Table]:
    """All that a report has to show."""
    made = [speed_table(report), details_table(report)]
    if "draft_model" in report:
        made.insert(1, speed_table(report, "draft_model"))
    parts = {"phases": phase_table, "sweep": sweep_table, "cost_curve": cost_table}
    parts |= {"concurrency": concurrency_table, "lengths": lengths_table}
    return made + [table(report) for key, table in parts.items() if key in report]


def speed_table(report: dict[str, Any], part: str | None = None) -> Table:
    """Speed by category, compared with plain decoding."""
    groups = report[part] if part else report
    named = [*groups["categories"].items(), ("overall", groups["overall"])]
    rows = [[name, *_cells(group)] for name, group in named]
    who, notes = (DRAFT_MODEL, []) if part else (OURS, _notes(report))
    notes.append(_equality_note(groups["overall"], report["settings"]["weights"]))
    header = ["prompts", "speed-up (95 %)", "tokens/s", "plain", "tokens per step", "same output"]
    return Table(f"{who} against plain decoding by mlx-lm", ["category", *header], rows, notes)


def details_table(report: dict[str, Any]) -> Table:
    """What else was measured, side by side."""
    overall = report["overall"]
    names = {
        "generation, tokens/s": "tps",
        "prompt processing, tokens/s": "prompt_tps",
        "time to first token, s": "time_to_first_token",
        "peak memory, GB": "peak_memory_gb",
        "energy per token, J": "energy_per_token",
    }
    rows = [[text, number(overall[f"baseline_{key}"]), number(overall[key])] for text, key in names.items()]
    if overall["energy_per_token"] is None:
        rows[-1][1:] = [report["settings"].get("energy", "not available")] * 2
    depths = " ".join(f"{share:.2f}" for share in overall["acceptance"])
    rows.append(["acceptance by depth", "", depths or "nothing drafted"])
    return Table("", ["", BASELINE, OURS], rows)


def _notes(report: dict[str, Any]) -> list[str]:
    machine, settings = report["machine"], report["settings"]
    notes = [
        f"{settings['model']}, {settings['weights']}; {machine['chip']}, MLX {machine['mlx']}, "
        f"mlx-lm {machine['mlx-lm']}; {report['finished']} prompts from {settings['prompts']}, up to "
        f"{settings['max_tokens']} tokens, temperature {settings['temp']:g}, draft {settings['shape']}.",
        "Speed-up: median over prompts of the ratio of generation speeds, with its 95 % bootstrap interval.",
    ]
    if report["finished"] < report["asked"]:
        notes.append(f"Interrupted: {report['finished']} of {report['asked']} prompts finished.")
    return notes


def _equality_note(overall: dict[str, Any], weights: str) -> str:
    found = overall["divergence"]
    if found is None:
        return "Sampled outputs differ by chance, so they were not compared."
    if overall["identical"]:
        return f"All {found['outputs']} outputs are the same as mlx-lm's, token for token."
    gaps = found["logit_gaps"]
    largest = f", the tokens' logits at most {number(gaps[-1])} apart" if gaps else ""
    verdict = " In float32 none should: please report it." if weights == "float32" else ""
    return (
        f"{found['diverged']} of {found['outputs']} outputs differ from mlx-lm's: "
        f"{found['per_1000_tokens']:.2f} times per 1,000 tokens{largest}.{verdict}"
    )


def _cells(group: dict[str, Any]) -> list[str]:
    return [
        str(group["prompts"]),
        speedup(group["speedup"]),
        number(group["tps"]),
        number(group["baseline_tps"]),
        f"{group['tokens_per_step']:.2f}",
        {True: "yes", False: "no", None: "–"}[group["identical"]],
    ]


def _groups(plan: Plan, asked: Sequence[Asked], name: str) -> dict[str, Any]:
    """The summaries of all prompts and of each category that has a name."""
    baseline = plan.contenders[0].name
    names = dict.fromkeys(prompt.prompt.category for prompt in asked if prompt.prompt.category)
    by_category = {x: [prompt for prompt in asked if prompt.prompt.category == x] for x in names}
    return {
        "overall": summary(asked, name, baseline, plan.exact),
        "categories": {x: summary(group, name, baseline, plan.exact) for x, group in by_category.items()},
    }


def _prompt(asked: Asked, exact: bool) -> dict[str, Any]:
    return {
        "number": asked.number,
        "category": asked.prompt.category,
        "turns": asked.prompt.turns,
        "speedup": ratio(asked, OURS, BASELINE),
        "tokens_per_step": tokens_per_step(asked.runs(OURS)),
        "baseline_tps": speed(asked.runs(BASELINE)),
        "tps": speed(asked.runs(OURS)),
        "identical": equality([asked], OURS, exact)["identical"],
        "answers": [{"text": run.text, "tokens": run.tokens} for run in asked.runs(BASELINE, 0)],
        "repeats": [_repeat(repeat, exact) for repeat in asked.repeats],
    }


def _repeat(repeat: Repeat, exact: bool) -> dict[str, Any]:
    run, divergence = repeat.run, repeat.divergence
    return {
        "turn": repeat.turn,
        "trial": repeat.trial,
        "contender": repeat.contender,
        "prompt_tokens": run.prompt_tokens,
        "tokens": len(run.tokens),
        "time_to_first_token": run.first,
        "seconds": run.seconds,
        "tps": speed([run]),
        "steps": run.steps,
        "tokens_per_step": tokens_per_step([run]),
        "acceptance": [hits / run.steps for hits in run.accepted] if run.steps else [],
        "peak_memory_gb": run.peak_memory,
        "energy_joules": run.joules,
        "identical": divergence is None if exact else None,
        **({"divergence": {"place": divergence.place, "logit_gap": divergence.gap}} if divergence else {}),
    }
