"""Projection of the speed-up on Apple's chips; nothing here was measured on one.

    uv run benchmarks/project.py benchmarks/results/acceptance-held-out.json --output projection.json

speed-up = tokens per step / (cost of verifying N rows + drafted depths * cost of a depth), in plain steps.
Tokens per step and acceptance were measured by this project, on SmolLM2-135M: that a larger model's drafter
does as well is an assumption. Costs of rows are published measurements (``published_curves.json``). A
depth costs what reading the drafter's weights takes against the model's; a drafter of the shape that
``train`` makes, scaled to the model, in the model's precision. Launching kernels costs nothing, unless
``--overhead`` says otherwise.
"""

import argparse
import json
import random
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import linear_regression
from typing import Any

import curves

from mlx_redrafter.decoding.state import DraftShape
from mlx_redrafter.engine.policy import LOOKUP, Policy
from mlx_redrafter.models.drafter import DrafterConfig, Quantization

LABEL = "PROJECTION from published kernel timings and acceptance measured on a small model; no Mac was used."
PLAIN = DraftShape(0, 0)
GRIDS = json.loads(Path(__file__).with_name("apple_grid.json").read_text())
APPLE_DEPTH = GRIDS["drafter"] / GRIDS["model"]  # of a drafted token: all of the drafter is read
KNEE = 16  # rows in half precision from which another kernel is used, which the fits leave out
SIMULATED = 3000  # steps of the policy
# chip, bits per weight, curves: the published one, and others that tell another story
SCENARIOS = (
    ("M1 Max", 16, ("m1-m2-fp16", "m1-pro-fp16")),
    ("M1 Max", 4, ("m1-m2-4bit",)),
    ("M2 Ultra", 16, ("m1-m2-fp16", "m1-pro-fp16")),
    ("M2 Ultra", 4, ("m1-m2-4bit",)),
    ("M3 Max", 16, ("m3-ultra-fp16",)),
    ("M3 Max", 4, ("m3-max-4bit",)),
    ("M4 Pro", 16, ("m3-ultra-fp16",)),
    ("M4 Pro", 4, ("m4-pro-4bit",)),
    ("M5 Max", 16, ("m3-ultra-fp16",)),
    ("M5 Max", 4, ("m5-max-4bit",)),
)


@dataclass(frozen=True)
class Model:
    """What decides a step's time: ``parameters`` that every token reads; and the drafter's sizes."""

    name: str
    parameters: float
    hidden: int
    draft_vocabulary: int = 16384

    def bytes_per_token(self, bits: int) -> float:
        """Of the weights; 4 bits come with a scale and a bias of 16 bits for 64 weights."""
        return self.parameters * (bits + (0.5 if bits < 16 else 0)) / 8

    def drafter_bytes(self, bits: int) -> float:
        """What a drafted depth reads, from the sizes of the drafter's tensors."""
        size = self.hidden
        quantization = None if bits == 16 else Quantization(bits)
        config = DrafterConfig(
            size,
            4 * self.draft_vocabulary,
            size,
            2,
            True,
            self.draft_vocabulary,
            (1, 2, 3),
            "simple",
            quantization,
        )
        shapes = config.shapes()
        shapes.pop("draft_to_target")
        total = sum(
            2 * _count(shape) * (2 if name.endswith("weight") and bits < 16 else 1)
            for name, shape in shapes.items()
        )
        context = size * config.context_size * (bits + (0.5 if bits < 16 else 0)) / 8  # read once per step
        return total - context


MODELS = (Model("1B", 1.24e9, 2048), Model("8B", 8.03e9, 4096), Model("27B", 27.0e9, 5376))


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


@dataclass(frozen=True)
class Measured:
    """A draft shape, and for each depth the share of the steps that emitted the token drafted there."""

    shape: DraftShape
    acceptance: tuple[float, ...]

    @property
    def tokens_per_step(self) -> float:
        return 1 + sum(self.acceptance)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "acceptance", type=Path, nargs="+", help="results of benchmarks/acceptance.py or of benchmark"
    )
    parser.add_argument(
        "--overhead", type=float, default=0.0, help="microseconds of launches per drafted depth"
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    try:
        found = with_shorter([m for path in args.acceptance for m in read(path)])
        report = project(found, args.overhead)
    except (ValueError, OSError, KeyError, TypeError) as error:
        sys.exit(f"error: {error}")
    rows = report["projections"]
    print(table(rows), check_table(report["check"]), fits_table(fits()), sources(rows), sep="\n\n")
    if args.output:
        args.output.write_text(json.dumps({"command": shlex.join(sys.argv), **report}, indent=1) + "\n")


def read(path: Path) -> list[Measured]:
    """The shapes of a results file: greedy ones of its first prompt file, or a benchmark's.

    Raises:
        ValueError: there are none.
    """
    raw = json.loads(path.read_text())
    rows = raw.get("results", [])
    greedy = [row for row in rows if not row.get("temperature") and row.get("file") == rows[0].get("file")]
    found = [Measured(_shape(row["shape"]), tuple(row["acceptance"])) for row in greedy]
    told = [row for row in raw.get("sweep", {}).get("rows", []) if "acceptance" in row]
    if "overall" in raw and isinstance(raw["settings"]["beam_width"], int):
        told.append({**raw["settings"], **raw["overall"]})
    found += [Measured(_told_shape(row), tuple(row["acceptance"])) for row in told]
    if not found:
        raise ValueError(f"{path} has no acceptance of a fixed draft shape, greedy: see acceptance.py.")
    return found


def _told_shape(row: dict[str, Any]) -> DraftShape:
    return DraftShape(row["beam_width"], row["beam_length"], row["max_nodes"], row["lookup"] or 0)


def _shape(raw: dict[str, int | None]) -> DraftShape:
    return DraftShape(**{name: value for name, value in raw.items() if value is not None})


def with_shorter(found: Sequence[Measured]) -> list[Measured]:
    """Also every shorter length of each shape that verifies all it drafts: these are its first depths."""
    by_shape = {m.shape: m for m in found}
    for m in found:
        s = m.shape
        if s.size == 1 + s.width * s.length and not s.lookup:
            for length in range(1, s.length):
                short = DraftShape(s.width, length)
                by_shape.setdefault(short, Measured(short, m.acceptance[:length]))
    return sorted(by_shape.values(), key=lambda m: (m.shape.size, m.shape.width))


def project(found: Sequence[Measured], overhead: float = 0.0) -> dict[str, Any]:
    """All scenarios, models and shapes.

    Args:
        found: what was measured.
        overhead: microseconds per drafted depth.
    """
    projections = [
        scenario(found, chip, bits, curve, model, overhead)
        for chip, bits, names in SCENARIOS
        for curve in names
        for model in MODELS
    ]
    return {
        "label": LABEL,
        "overhead_us_per_depth": overhead,
        "acceptance": [{"shape": asdict(m.shape), "acceptance": m.acceptance} for m in found],
        "models": [asdict(model) for model in MODELS],
        "projections": projections,
        "check": check(),
    }


def scenario(
    found: Sequence[Measured], chip: str, bits: int, curve: str, model: Model, overhead: float = 0.0
) -> dict[str, Any]:
    """One chip, precision and model: the speed-up of every shape, the best one, and what the policy does."""
    cost, most = curves.curve(curve), curves.most_rows(curve)
    step_us = 1e-3 * model.bytes_per_token(bits) / curves.published()["bandwidth"][chip]
    depth = model.drafter_bytes(bits) / model.bytes_per_token(bits)

    def seconds(shape: DraftShape) -> float:  # plain steps
        rows = min(shape.length, 1) + max(shape.length - 1, 0) * cost(min(max(shape.width, 1), most))
        return cost(shape.size) + depth * rows + shape.length * overhead / step_us

    usable = [m for m in found if m.shape.size <= most]
    speedups = {m.shape: m.tokens_per_step / seconds(m.shape) for m in usable} | {PLAIN: 1.0}
    best = max(speedups, key=lambda shape: speedups[shape])
    chosen, reached = follow_policy(usable, seconds)
    return {
        "chip": chip,
        "bits": bits,
        "model": model.name,
        "curve": curve,
        "most_plain_tokens_per_second": round(1e6 / step_us, 1),
        "drafted_depth_cost": round(depth, 4),
        "best": asdict(best),
        "speedup": round(speedups[best], 3),
        "policy": {"shape": asdict(chosen), "speedup": round(reached, 3)},
        "policy_of_best": round(reached / speedups[best], 3),
        "shapes": [{**asdict(shape), "speedup": round(value, 3)} for shape, value in speedups.items()],
    }


def follow_policy(
    found: Sequence[Measured], seconds: Callable[[DraftShape], float]
) -> tuple[DraftShape, float]:
    """The shape that ``Policy`` uses most when it starts knowing nothing, and its tokens per plain step.

    A step is one coin: a shape's token at a depth is accepted if the coin is below its measured
    acceptance there, and its rank is that of the narrowest beam that would have had it.
    """
    fared = {m.shape: m.acceptance for m in found} | {PLAIN: ()}
    shapes = candidates(found, seconds)
    policy, chance = Policy(shapes, [seconds(shape) for shape in shapes]), random.Random(0)
    used, time, tokens = dict.fromkeys(shapes, 0), 0.0, 0
    following = policy.choose()
    for _ in range(SIMULATED):
        shape, following = following, policy.choose()
        coin = chance.random()
        ranks = [rank(found, shape, depth, coin) for depth, share in enumerate(fared[shape]) if coin < share]
        policy.observe(shape, {1: ranks})
        used[shape] += 1
        time += seconds(shape)
        tokens += 1 + len(ranks)
    return max(used, key=lambda shape: used[shape]), tokens / time


def candidates(found: Sequence[Measured], seconds: Callable[[DraftShape], float]) -> list[DraftShape]:
    """Plain decoding and the seven best shapes: a policy is given few, as compiling each takes time."""
    ranked = sorted(found, key=lambda m: seconds(m.shape) / m.tokens_per_step)
    return [PLAIN, *(m.shape for m in ranked if m.shape != PLAIN)][:8]


def rank(found: Sequence[Measured], shape: DraftShape, depth: int, coin: float) -> int:
    """The narrowest full beam that has the token at a depth (from 0); else the text, or the last rank."""
    full = [m for m in found if m.shape.lookup == 0 and len(m.acceptance) > depth]
    widths = [m.shape.width for m in full if coin < m.acceptance[depth] and m.shape.width <= shape.width]
    if widths:
        return min(widths) - 1
    return LOOKUP if shape.lookup else shape.width - 1


def check() -> dict[str, Any]:
    """What the formula says where a measurement on a Mac is published (arXiv 2403.09919; M1 Max, Vicuna 7B).

    How many tokens were drafted is not published; four are assumed.
    """
    published, tokens, drafter, model, length = 1.32, 2.15, 0.43e9, 6.74e9, 4
    said = {}
    for name in ("m1-m2-fp16", "m1-pro-fp16"):
        said[name] = round(tokens / (curves.curve(name)(1 + length) + length * drafter / model), 2)
    return {"what": "M1 Max, 7B, width 1, 2.15 tokens per step", "published": published, "projected": said}


@dataclass(frozen=True)
class Fit:
    """A step of Apple's own MLX code below 16 rows, in plain steps.

    It is 1 + ``fixed`` + ``per_row`` for each row after the first + ``APPLE_DEPTH`` for each depth.
    """

    chip: str
    weights: str
    fixed: float
    per_row: float
    errors: dict[tuple[int, int], float]  # of the widths and lengths that it was not fitted on

    def step(self, width: int, length: int) -> float:
        return 1 + self.fixed + self.per_row * (width * (length + 1) - 1) + length * APPLE_DEPTH


def fits(column: int = 3) -> list[Fit]:
    """Apple's published grids, each fitted at ``column`` drafted tokens, and how far it is off."""
    found = []
    for grid in GRIDS["grids"]:
        measured = {
            (int(width), length): step
            for width, cells in grid["by_width"].items()
            for length, step in enumerate(cells["step"], 1)
            if int(width) * (length + 1) < KNEE
        }
        known = [
            (w * (n + 1) - 1, step - 1 - n * APPLE_DEPTH) for (w, n), step in measured.items() if n == column
        ]
        per_row, fixed = linear_regression(*zip(*known, strict=True))
        fit = Fit(grid["chip"], grid["weights"], fixed, per_row, {})
        others = {
            shape: fit.step(*shape) / step - 1 for shape, step in measured.items() if shape[1] != column
        }
        found.append(replace(fit, errors=others))
    return found


def fits_table(found: Sequence[Fit]) -> str:
    """Markdown: the fits, and a chain of 4 with Apple's acceptance, if our step had its cost per row."""
    depth = Model("7B", GRIDS["model"], 4096).drafter_bytes(16) / (2 * GRIDS["model"])
    lines = [
        "| chip | weights | fixed | per row | worst error | chain of 4, Apple's | ours, fixed 0.2 | 0 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for fit, grid in zip(found, GRIDS["grids"], strict=True):
        chain = grid["by_width"]["1"]
        worst = max(fit.errors, key=lambda shape: abs(fit.errors[shape]))
        ours = [chain["tokens"][3] / (1 + fixed + 4 * (fit.per_row + depth)) for fixed in (0.2, 0.0)]
        lines.append(
            f"| {fit.chip} | {fit.weights} | {fit.fixed:.2f} | {fit.per_row:.3f} | {fit.errors[worst]:+.0%} "
            f"({worst[0]}x{worst[1]}) | {chain['tokens'][3] / chain['step'][3]:.2f} "
            f"| {ours[0]:.2f} | {ours[1]:.2f} |"
        )
    return "\n".join(lines)


def table(projections: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        LABEL,
        "",
        "| chip | weights | model | curve | best shape | speed-up | the policy's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in projections:
        weights = "fp16" if row["bits"] == 16 else f"{row['bits']} bits"
        lines.append(
            f"| {row['chip']} | {weights} | {row['model']} | {row['curve']} | {_name(row['best'])} "
            f"| {row['speedup']:.2f} | {row['policy']['speedup']:.2f} ({_name(row['policy']['shape'])}) |"
        )
    return "\n".join(lines)


def check_table(checked: dict[str, Any]) -> str:
    """A sentence."""
    said = ", ".join(f"{value:.2f} ({name})" for name, value in checked["projected"].items())
    return f"The same formula for {checked['what']}: {said}; published: {checked['published']:.2f}."


def sources(projections: Sequence[dict[str, Any]]) -> str:
    """Where the curves of the projections come from, and what of them was not measured."""
    lines = []
    for name in dict.fromkeys(row["curve"] for row in projections):
        entry = curves.published()["curves"][name]
        derived = f"; derived: {entry['derived']}" if "derived" in entry else ""
        lines.append(f"- {name}: {entry['what']}; {entry['source']}{derived}.")
    return "\n".join(lines)


def _name(shape: dict[str, int | None]) -> str:
    s = _shape(shape)
    return (
        "plain"
        if s == PLAIN
        else f"{s.width}x{s.length}, {s.size}" + (f", lookup {s.lookup}" if s.lookup else "")
    )


if __name__ == "__main__":
    main()
