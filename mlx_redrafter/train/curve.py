"""The learning curve of a run, as a PNG beside its card."""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

NAME = "learning_curve.png"
PACKAGE = "matplotlib"


def can_draw() -> bool:
    """Whether the package that draws is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def draw(scores: Sequence[Mapping[str, Any]]) -> bytes:
    """The PNG of ``plot``."""
    file = io.BytesIO()
    plot(scores).savefig(file, format="png", dpi=120)
    return file.getvalue()


def plot(scores: Sequence[Mapping[str, Any]]) -> Any:
    """Held-out loss and tokens per step against minutes.

    Args:
        scores: of a run, in order: ``seconds`` since it began, ``positions`` trained on so far, and what
            ``Score`` has.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    left = figure.add_subplot(xlabel="minutes of the whole run")
    minutes = [score["seconds"] / 60 for score in scores]
    for axes, name, values, colour in (
        (left, "held-out loss (nats, mean of the depths)", [fmean(x["loss"]) for x in scores], "C0"),
        (left.twinx(), "held-out tokens per step", [x["tokens_per_step"] for x in scores], "C1"),
    ):
        axes.plot(minutes, values, color=colour, marker="o")
        axes.set_ylabel(name, color=colour)
    left.grid(alpha=0.3)
    left.set_title(f"{scores[-1]['positions']:,} positions trained on", fontsize=10)
    return figure
