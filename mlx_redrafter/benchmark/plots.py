"""Pictures of a report, as PNG files."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..loading.files import atomic_file
from .sweep import numbers, shape_name

MARKS = {"best": "★", "automatic": "▢"}


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what the report has; the files that were written."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_save(plot(report), folder / file) for key, file, plot in PLOTS if report.get(key)]


def speedup(report: dict[str, Any]) -> Any:
    """Speed-up of each category with its interval."""
    groups = {**report["categories"], "overall": report["overall"]}
    found = {name: x["speedup"] for name, x in groups.items() if x["speedup"]["median"] is not None}
    figure, [axes] = _figure(7, 1.2 + 0.35 * len(found))
    names, values = list(found), list(found.values())
    medians = [x["median"] for x in values]
    errors = [[x["median"] - x["low"] for x in values], [x["high"] - x["median"] for x in values]]
    colours = ["C1" if name == "overall" else "C0" for name in names]
    axes.barh(names, medians, xerr=errors, color=colours, capsize=3)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    text = "speed-up over plain decoding by mlx-lm (median, 95 % interval)"
    axes.set(xlabel=text, title=_title(report))
    return figure


def heat_map(report: dict[str, Any]) -> Any:
    """Speed-up by width and length, one map for each budget of nodes."""
    found = report["sweep"]
    budgets = found["budgets"]
    figure, all_axes = _figure(1 + 3.2 * len(budgets), 4.2, columns=len(budgets))
    values = [row["speedup"]["median"] for row in found["rows"] if row["speedup"]["median"] is not None]
    for axes, budget in zip(all_axes, budgets, strict=True):
        image = _map(axes, found, budget, min(values, default=0), max(values, default=1))
    figure.colorbar(image, ax=all_axes, label="speed-up over plain decoding")
    marks = [f"{mark} {key}: {shape_name(found[key])}" for key, mark in MARKS.items() if found[key]]
    figure.suptitle("\n".join([_title(report), *marks]), fontsize=10)
    return figure


def cost_curve(report: dict[str, Any]) -> Any:
    """Time of a verification relative to that of one token."""
    rows = report["cost_curve"]["rows"]
    figure, [axes] = _figure(7, 4.5)
    most = rows[-1]["tokens"]
    axes.plot([r["tokens"] for r in rows], [r["relative"] for r in rows], marker="o", label="measured")
    axes.loglog([1, most], [1, most], "--", base=2, color="grey", label="one after another")
    ticks = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= most]
    axes.set_xticks(ticks, ticks)
    axes.set_yticks(ticks, ticks)
    relative = f"time, relative to one token ({1000 * rows[0]['seconds']:.3g} ms)"
    axes.set(xlabel="tokens verified at once", ylabel=relative, title=_title(report))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def lengths(report: dict[str, Any]) -> Any:
    """Speed-up by tokens before, with its interval."""
    rows = [row for row in report["lengths"] if row["speedup"]["median"] is not None]
    figure, [axes] = _figure(7, 4)
    places, found = [row["prompt_tokens"] for row in rows], [row["speedup"] for row in rows]
    errors = [[x["median"] - x["low"] for x in found], [x["high"] - x["median"] for x in found]]
    axes.errorbar(places, [x["median"] for x in found], errors, marker="o", capsize=3)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:,.0f}" for place in places])
    text = "speed-up over plain decoding (median, 95 % interval)"
    axes.set(xlabel="tokens before", ylabel=text, title=_title(report))
    axes.grid(alpha=0.3)
    return figure


PLOTS = (
    ("overall", "speedup.png", speedup),
    ("sweep", "sweep.png", heat_map),
    ("cost_curve", "cost-curve.png", cost_curve),
    ("lengths", "lengths.png", lengths),
)


def _map(axes: Any, found: dict[str, Any], budget: int | None, low: float, high: float) -> Any:
    widths, lengths = found["widths"], found["lengths"]
    rows = {numbers(row): row for row in found["rows"]}

    def cell(width: int, length: int) -> dict[str, Any] | None:
        most = 1 + width * length + found["lookup"]
        row = rows.get((width, length, most if budget is None else min(budget, most), found["lookup"]))
        return row if row and row["speedup"]["median"] is not None else None

    grid = [[cell(width, length) for length in lengths] for width in widths]
    medians = [[float("nan") if x is None else x["speedup"]["median"] for x in row] for row in grid]
    image = axes.imshow(medians, cmap="viridis", vmin=low, vmax=high, aspect="auto")
    for i, row in enumerate(grid):
        for j, x in enumerate(row):
            if x is None:
                continue
            median, star = x["speedup"]["median"], MARKS["best"] * (numbers(x) == numbers(found["best"]))
            colour = "black" if median > (low + high) / 2 else "white"
            axes.text(j, i, f"{star}{median:.2f}", ha="center", va="center", color=colour)
            if numbers(x) == numbers(found["automatic"]):
                corner = (j - 0.46, i - 0.46)
                axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor="red", linewidth=2))
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_yticks(range(len(widths)), widths)
    axes.set(xlabel="length", ylabel="width")
    axes.set_title("all nodes" if budget is None else f"at most {budget} nodes", fontsize=10)
    return image


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, [figure.add_subplot(1, columns, i + 1) for i in range(columns)]


def _title(report: dict[str, Any]) -> str:
    model = str(report["settings"]["model"]).rstrip("/").rsplit("/", 1)[-1]
    return f"{model}, {report['settings']['weights']}, {report['machine']['chip']}"


def _save(figure: Any, path: Path) -> Path:
    with atomic_file(path) as new:
        figure.savefig(new, dpi=150)
    return path
